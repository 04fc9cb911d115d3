//! Ids equal to those of Hugging Face's `tokenizers`, and text equal to what was encoded.

use data::open_tokenizer;

use crate::corpus::{self, Random};

#[test]
fn ids_are_those_of_the_reference_and_decode_is_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 1, 100).join("tokenizer.json");
    let fast = open_tokenizer(&path).unwrap();
    let reference = open_tokenizer(&path).unwrap().into_reference().unwrap();
    assert!(fast.is_fast() && !reference.is_fast());
    let end = fast.end_token(None).unwrap();
    let mut random = Random(3);
    let source = include_str!("tokenizer.rs");
    let texts = (0..300).map(|i| corpus::text(&mut random, i)).chain([source.to_owned(), String::new()]);
    let mut mentions = 0;
    for text in texts {
        let ids = fast.encode_document(&text).unwrap();
        assert_eq!(ids, reference.encode_document(&text).unwrap(), "{text:?}");
        assert!(!ids.contains(&end), "a document cannot end itself: {text:?}");
        assert_eq!(fast.decode(&ids).unwrap(), text);
        assert_eq!(reference.decode(&ids).unwrap(), text);
        assert!(ids.iter().all(|id| *id < fast.vocab_size()));
        let ids = fast.encode(&text).unwrap();
        assert_eq!(ids, reference.encode(&text).unwrap(), "{text:?}");
        mentions += ids.iter().filter(|id| **id == end).count();
    }
    assert!(mentions > 100, "the texts mention the end token: {mentions}");
}

#[test]
fn a_tokenizer_that_the_fast_encoder_refuses_falls_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 2, 30).join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"});
    let odd = folder.path().join("odd.json");
    std::fs::write(&odd, json.to_string()).unwrap();
    let odd = open_tokenizer(&odd).unwrap();
    assert!(!odd.is_fast());
    assert!(!odd.encode("let x").unwrap().is_empty());
}
