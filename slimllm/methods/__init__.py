"""What pruning decides: criteria choose, recoveries repair, allocations spread the ratio over the layers."""
