"""What tools/make_sample_voc.py draws: objects, and the scenes they stand in."""
