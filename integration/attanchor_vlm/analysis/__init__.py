"""Before training: which threshold to take, and whether matching follows the images at all."""
