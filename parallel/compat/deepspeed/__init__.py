"""Guards and patches of DeepSpeed: its start, its operators, ZeRO's partitions, swapping to disks."""
