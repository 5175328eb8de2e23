"""Using what was trained: captions of pictures, a merged model, an evaluation (docs/use.md)."""
