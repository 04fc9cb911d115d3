//! The crate's tests through its public face. One binary: it links once.

mod columns;
mod corpus;
mod faults;
mod inputs;
mod order;
mod prepare;
mod refuse;
mod restart;
mod stores;
mod tokenizer;
