"""A page in the browser on which one draws a hint and sees the ControlNet obey; see `play.py`."""
