"""DeepSeek-V4.1: what differs from DeepSeek-V4, on whose parts it is built."""
