"""The metrics of a run in TensorBoard, Weights & Biases or Trackio: they read what it wrote, training knows none of them."""
