"""Everything that only the mini model needs: its images, its sentences, its CLIP."""
