"""Everything that only the mini model needs: its world of scenes, its sentences, its CLIP."""
