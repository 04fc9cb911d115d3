//! All tests that need more than one crate, in one binary.
#![cfg(test)]
mod layers;
mod runs;
mod support;
mod tidy;
