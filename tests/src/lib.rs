//! All tests that need more than one crate, in one binary.
#![cfg(test)]
mod balance;
mod faces;
mod layers;
mod oracle;
mod runs;
mod support;
mod tidy;
