"""The way in: compose, resolve, check, explain, dispatch. Nothing here imports torch before a run starts."""
