"""The host side of a sweep: everything that touches the clock, disk, terminal or devices."""
