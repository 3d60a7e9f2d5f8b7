"""What is measured, one function a contender. Each runs in a process of its own, because an import alone can change the
speed of everything else in the process (Lightning sets a variable that costs every optimizer step 95 us without a GPU)."""
