//! The prepared corpus on disk: one folder a source.
//!
//!     manifest.json          what there is, and the hashes of what it names; written last
//!     tokenizer.json         Hugging Face format; tokenizer_config.json beside it
//!     train.index            one record a row group, see `index`
//!     held_out.index
//!     train-00000.parquet …  see `shard`
//!     held_out-00000.parquet …
//!
//! Invariant: the manifest holds the index's root hash, the index the checksum of every row group, so
//! the manifest alone identifies every token.

pub mod index;
pub mod manifest;
pub mod shard;

/// The two token streams of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Train,
    HeldOut,
}

impl Split {
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::HeldOut => "held_out",
        }
    }

    pub fn shard_file(self, shard: u32) -> String {
        format!("{}-{shard:05}.parquet", self.name())
    }

    pub fn index_file(self) -> String {
        format!("{}.index", self.name())
    }
}
