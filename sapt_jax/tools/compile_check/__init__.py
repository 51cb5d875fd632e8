"""Ahead-of-time compilation for TPU and GPU topologies: memory, work and an estimated time, without the hardware."""
