//! All tests that need more than one crate, in one binary.
#![cfg(test)]
mod account;
mod balance;
mod chaos;
mod checkpoint;
mod configs;
mod corpus;
mod corruption;
mod documents;
mod export;
mod faces;
mod faults;
mod fp8;
mod gpu;
mod gpus;
mod launching;
mod layers;
mod layouts;
mod oracle;
mod overlap;
mod runs;
mod s3;
mod sentinel;
mod support;
mod tidy;
mod tiers;
mod zero;
