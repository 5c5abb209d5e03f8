"""Shared microexponents: block formats with two levels of scale, and tensors in them. Imports only torch."""
