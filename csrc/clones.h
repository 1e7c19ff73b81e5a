// Functions compiled for several instruction sets, so that their loops use the processor's longest vectors.

#pragma once

// This needs GCC 12, which knows these architecture names, and a C library that picks a clone at load time. Sanitizers see
// the plain version.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SLIMLLM_X86_LEVELS 1
// A clone of a function for each instruction set.
#define SLIMLLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
// One version of a function, where versions differ in their source.
#define SLIMLLM_ONLY(architecture) __attribute__((target("arch=" architecture), flatten))
#else
#define SLIMLLM_X86_LEVELS 0
#define SLIMLLM_CLONES
#endif
