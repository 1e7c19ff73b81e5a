"""Methods: criteria choose units, recoveries make up for the removed ones, allocations spread the ratio over the layers."""
