//! What the readers of JSON in this crate share: strings that are borrowed where they can be, and errors of our own on
//! the way through serde, whose errors are texts.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use serde::de::{self, Deserializer, Visitor};

use crate::error::Error;

/// Where a fault that has a kind of its own is put down, as serde can only stop with a text.
pub(crate) type Fault = RefCell<Option<Error>>;

/// Puts `error` down as the cause, and gives serde something to stop with.
pub(crate) fn refuse<E: de::Error>(fault: &Fault, error: Error) -> E {
    *fault.borrow_mut() = Some(error);
    E::custom("refused")
}

/// A string, borrowed from the JSON unless it has escapes.
pub(crate) struct Text<'de>(pub(crate) Cow<'de, str>);

impl<'de> de::Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> std::result::Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}
