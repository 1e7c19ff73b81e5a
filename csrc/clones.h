// Functions compiled for several instruction sets, so that their loops use the processor's longest vectors.

#pragma once

// This needs GCC 12, which knows these architecture names.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define SLIMLLM_X86_LEVELS 1
#else
#define SLIMLLM_X86_LEVELS 0
#endif

// One version of a function, where versions differ in their source.
#define SLIMLLM_ONLY(architecture) __attribute__((target("arch=" architecture), flatten))

// A clone of a function for each instruction set, among which the C library picks at load time; a sanitizer cannot do that.
#if SLIMLLM_X86_LEVELS && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SLIMLLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define SLIMLLM_CLONES
#endif
