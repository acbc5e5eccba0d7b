"""One benchmark a file: where its photographs, labels and masks lie."""
