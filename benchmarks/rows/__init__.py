"""What is compared with what, and the target of each comparison. One module a subject; every module is found by itself."""
