"""Write a quantized checkpoint: what `quire quantize` does. Formats are the plugins' business."""
