"""Many adapters in host memory, few of them on the device, any mix of them in a batch."""
