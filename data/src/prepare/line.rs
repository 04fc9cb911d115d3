//! The text of one line of JSONL. A line that Python's json.loads takes gives it: of the fields besides nothing is asked
//! but that they end.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

/// The text of a line; of a null, as of a null in parquet, none.
pub(super) fn text_of(json: &mut [u8], key: &str) -> Result<String, String> {
    let read = |json: &[u8]| {
        let mut json = serde_json::Deserializer::from_slice(json);
        json.deserialize_map(Field(key)).and_then(|text| json.end().map(|()| text))
    };
    // Looked for only where it keeps a line from being read.
    let text = read(json).or_else(|error| if blank_numbers(json) { read(json) } else { Err(error) });
    text.map_err(|e| e.to_string())?.ok_or_else(|| format!("has no {key:?}"))
}

/// Makes a 0 of what Python writes for numbers that JSON lacks, outside of strings. True if there was any.
fn blank_numbers(json: &mut [u8]) -> bool {
    let (mut at, mut found, mut quoted) = (0, false, false);
    while at < json.len() {
        let name: Option<&[u8]> = [&b"NaN"[..], b"Infinity"].into_iter().find(|name| !quoted && json[at..].starts_with(name));
        match (name, json[at]) {
            (Some(name), _) => {
                json[at..at + name.len()].fill(b' ');
                json[at] = b'0';
                found = true;
            }
            (None, b'"') => quoted = !quoted,
            (None, b'\\') => at += 1,
            _ => {}
        }
        at += 1;
    }
    found
}

/// The value of one key of a line. Others are passed over, whatever numbers, depth or halves of surrogates they hold; of a
/// key that comes twice the last counts.
struct Field<'k>(&'k str);

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<String>, A::Error> {
        let mut text = None;
        while let Some(wanted) = map.next_key_seed(Named(self.0))? {
            match wanted {
                true => {
                    let value: Option<String> = map.next_value().map_err(|e| Error::custom(format!("{:?}: {e}", self.0)))?;
                    text = Some(value.unwrap_or_default());
                }
                false => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(text)
    }
}

/// Whether a key is the one; read as bytes, for a key may be no UTF-8 either.
struct Named<'k>(&'k str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, key: D) -> Result<bool, D::Error> {
        key.deserialize_bytes(self)
    }
}

impl Visitor<'_> for Named<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_bytes<E>(self, key: &[u8]) -> Result<bool, E> {
        Ok(key == self.0.as_bytes())
    }
}
