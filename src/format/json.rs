//! JSON for the headers and indexes: borrowed strings, values that are skipped, and errors with a kind. serde's errors are
//! only texts.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::error::Error;

/// Holds an error with a kind while serde propagates a placeholder.
pub(crate) type ErrorSlot = RefCell<Option<Error>>;

/// Stores `error`, and returns a placeholder for serde.
pub(crate) fn fail_with<E: de::Error>(slot: &ErrorSlot, error: Error) -> E {
    *slot.borrow_mut() = Some(error);
    E::custom("refused")
}

/// Parses `text` as one object with `visitor`, which stores its own errors in `slot`. `convert` converts those of serde.
pub(crate) fn parse_object<'de, V: Visitor<'de>>(
    text: &'de str,
    slot: &ErrorSlot,
    visitor: V,
    convert: impl FnOnce(serde_json::Error) -> Error,
) -> Result<V::Value, Error> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let outcome = ObjectSeed(visitor)
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    outcome.map_err(|error| slot.take().unwrap_or_else(|| convert(error)))
}

pub(crate) struct ObjectSeed<V>(pub(crate) V);

impl<'de, V: Visitor<'de>> DeserializeSeed<'de> for ObjectSeed<V> {
    type Value = V::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self.0)
    }
}

/// Skips a value. Unlike serde's `IgnoredAny`, it respects the limit of nesting; unlike `serde_json::Value`, it needs no
/// memory.
pub(crate) struct IgnoredValue;

impl<'de> de::Deserialize<'de> for IgnoredValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(IgnoredValue)
    }
}

macro_rules! ignore {
    ($( $visit:ident($value:ty) )*) => {
        $( fn $visit<E: de::Error>(self, _: $value) -> Result<IgnoredValue, E> { Ok(self) } )*
    };
}

impl<'de> Visitor<'de> for IgnoredValue {
    type Value = IgnoredValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    ignore! {
        visit_bool(bool)
        visit_i64(i64)
        visit_u64(u64)
        visit_f64(f64)
        visit_str(&str)
    }

    fn visit_unit<E: de::Error>(self) -> Result<IgnoredValue, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<IgnoredValue, A::Error> {
        while elements.next_element::<IgnoredValue>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<IgnoredValue, A::Error> {
        while map.next_entry::<JsonText<'de>, IgnoredValue>()?.is_some() {}
        Ok(self)
    }
}

/// A string, borrowed from the JSON unless it contains escapes.
#[derive(PartialEq, Eq, Hash)]
pub(crate) struct JsonText<'de>(pub(crate) Cow<'de, str>);

impl<'de> de::Deserialize<'de> for JsonText<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = JsonText<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<JsonText<'de>, E> {
                Ok(JsonText(Cow::Borrowed(text)))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<JsonText<'de>, E> {
                Ok(JsonText(Cow::Owned(text.to_owned())))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skip(text: &str) -> serde_json::Result<IgnoredValue> {
        serde_json::from_str(text)
    }

    #[test]
    fn every_json_value_is_skipped() {
        for text in [
            "null",
            "true",
            "-7",
            "18446744073709551615",
            "1.5e3",
            r#""a\u00e4\n""#,
            "[]",
            r#"[1, {"b": [{}]}]"#,
        ] {
            assert!(skip(text).is_ok(), "{text}");
        }
        for text in ["", "[1,]", r#"{"a" 1}"#, r#"{1: 2}"#, r#""\ud800""#, "1e999", "[", "nul"] {
            assert!(skip(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nesting_has_a_limit() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(skip(&nested(100)).is_ok());
        assert!(skip(&nested(1_000)).is_err());
        assert!(skip(&r#"{"a":"#.repeat(100_000)).is_err());
    }
}
