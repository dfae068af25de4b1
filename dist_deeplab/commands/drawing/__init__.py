"""What dist-deeplab sample-voc draws: objects, and the scenes they stand in."""
