//! All tests that need more than one crate, in one binary.
#![cfg(test)]
mod layers;
mod support;
mod tidy;
