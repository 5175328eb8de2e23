"""The loop and its stages. Start reading at `trainer.py`."""
