//! Ids equal to those of Hugging Face's `tokenizers`, and text equal to what was encoded.

use std::fs;

use data::{Split, open_tokenizer, prepare};
use serde_json::json;

use crate::corpus::{self, Random};
use crate::prepare::documents;

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

#[test]
fn a_document_is_whole_whatever_the_tokenizer_does_to_a_model_s_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let made = corpus::prepared(folder.path(), 3, 60).join("tokenizer.json");
    let (plain, mut random) = (open_tokenizer(&made).unwrap(), Random(4));
    let text = corpus::text(&mut random, 300);
    let ids = plain.encode_document(&text).unwrap();
    let truncation = json!({"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0});
    let padding = json!({"strategy": {"Fixed": ids.len() * 2}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 2, "pad_type_id": 0, "pad_token": "<｜▁pad▁｜>"});
    for (key, value) in [("/truncation", truncation), ("/padding", padding), ("/model/dropout", json!(1.0))] {
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&made).unwrap()).unwrap();
        *json.pointer_mut(key).unwrap() = value;
        let (path, input) = (folder.path().join("t.json"), folder.path().join("in.txt"));
        fs::write(&path, json.to_string()).unwrap();
        let (fast, slow) = (open_tokenizer(&path).unwrap(), open_tokenizer(&path).unwrap().into_reference().unwrap());
        for tokenizer in [&fast, &slow] {
            assert_eq!(tokenizer.encode_document(&text).unwrap(), ids, "{key}, fast: {}", tokenizer.is_fast());
            assert_eq!(tokenizer.encode(&text).unwrap(), plain.encode(&text).unwrap(), "{key}, fast: {}", tokenizer.is_fast());
        }
        fs::write(&input, &text).unwrap();
        let mut args = corpus::args(&input, &folder.path().join(key.replace('/', "-")));
        (args.vocab, args.tokenizer, args.held_out) = (None, Some(path.clone()), 0.0);
        prepare(&args).unwrap();
        assert_eq!(documents(&args.out, Split::Train), [text.as_str()]);
        assert_eq!(fs::read(args.out.join("tokenizer.json")).unwrap(), fs::read(path).unwrap(), "the copy is the file given");
    }
}
