//! Parses the JSON of a header in one pass, into the arenas of [`Header`]. Refuses duplicates.

use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::malformed;
use super::table::{ArenaRange, Header, METADATA_KEY, Metadata, TensorRecord};
use crate::error::{Error, ErrorKind};
use crate::format::dtype::Dtype;
use crate::format::json::{self, ErrorSlot, IgnoredValue, JsonText, fail_with};

pub(super) fn parse(json: &[u8]) -> Result<Header, Error> {
    if json.is_empty() {
        let detail = "the header length is 0: space was set aside for the file, but it was never written (a download \
                      that was interrupted?), or it is not a safetensors file; fetch or save it again";
        return Err(Error::new(ErrorKind::HeaderJson, detail));
    }
    let text = std::str::from_utf8(json).map_err(|error| {
        let detail = format!("the header is not UTF-8: bad byte at {}", error.valid_up_to());
        malformed(ErrorKind::HeaderUtf8, detail)
    })?;
    let mut header = Header {
        tensors: Vec::new(),
        by_name: Vec::new(),
        names: String::new(),
        dims: Vec::new(),
        metadata: None,
        data_start: 0,
    };
    let slot = RefCell::new(None);
    json::parse_object(text, &slot, HeaderVisitor { header: &mut header, slot: &slot }, |error| {
        let fault = match text.trim_end_matches('\0') {
            "" => "the header is all zeros: space was set aside for the file, but it was never written (a download that \
                   was interrupted?); fetch or save it again"
                .to_string(),
            rest if rest.len() < text.len() => "the header is padded with NUL bytes: the format pads with spaces; replace \
                                                the NUL bytes with spaces (0x20), or save the file with another program"
                .to_string(),
            _ => return malformed(ErrorKind::HeaderJson, format!("the header is not valid: {error}")),
        };
        Error::new(ErrorKind::HeaderJson, fault)
    })?;
    Ok(header)
}

/// The header: an object of tensors and, optionally, metadata.
struct HeaderVisitor<'h> {
    header: &'h mut Header,
    slot: &'h ErrorSlot,
}

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object that maps tensor names to their dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen_metadata = false;
        while let Some(JsonText(name)) = map.next_key()? {
            if name == METADATA_KEY {
                if std::mem::replace(&mut seen_metadata, true) {
                    let detail = format!("the header has {METADATA_KEY:?} twice");
                    return Err(fail_with(self.slot, malformed(ErrorKind::Duplicate, detail)));
                }
                self.header.metadata = map.next_value_seed(MetadataSeed(self.slot))?;
                continue;
            }
            let raw = map.next_value_seed(TensorSeed {
                name: &name,
                dims: &mut self.header.dims,
                slot: self.slot,
            })?;
            let start = self.header.names.len();
            self.header.names.push_str(&name);
            self.header.tensors.push(TensorRecord {
                name: ArenaRange::new(start, self.header.names.len()),
                shape: raw.shape,
                dtype: raw.dtype,
                begin: raw.begin,
                end: raw.end,
            });
        }
        Ok(())
    }
}

/// `__metadata__`: an object of strings, or null.
struct MetadataSeed<'h>(&'h ErrorSlot);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = Option<Metadata>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = Option<Metadata>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{METADATA_KEY:?} to be an object of strings, or null")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut metadata = Metadata::new();
        while let Some(JsonText(key)) = map.next_key()? {
            let JsonText(value) = map.next_value().map_err(|error| {
                let detail = format!("{METADATA_KEY:?}: the value of {key:?} must be a string: {error}");
                fail_with(self.0, malformed(ErrorKind::HeaderJson, detail))
            })?;
            if metadata.insert(key.to_string(), value.into_owned()).is_some() {
                let detail = format!("{METADATA_KEY:?} has the key {key:?} twice");
                return Err(fail_with(self.0, malformed(ErrorKind::Duplicate, detail)));
            }
        }
        Ok(Some(metadata))
    }
}

/// The fields of a tensor; the shape is in the arena.
struct RawTensor {
    dtype: Dtype,
    shape: ArenaRange,
    begin: u64,
    end: u64,
}

/// A tensor: an object with `dtype`, `shape` and `data_offsets`. Other fields are skipped.
struct TensorSeed<'h> {
    name: &'h str,
    dims: &'h mut Vec<u64>,
    slot: &'h ErrorSlot,
}

impl TensorSeed<'_> {
    /// Stores an error of this tensor.
    fn refuse<E: de::Error>(&self, kind: ErrorKind, what: impl fmt::Display) -> E {
        fail_with(self.slot, malformed(kind, format!("tensor {:?}: {what}", self.name)))
    }
}

impl<'de> DeserializeSeed<'de> for TensorSeed<'_> {
    type Value = RawTensor;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawTensor, D::Error> {
        let (name, slot) = (self.name, self.slot);
        deserializer.deserialize_map(self).map_err(|error| {
            if slot.borrow().is_some() {
                return error;
            }
            fail_with(slot, malformed(ErrorKind::HeaderJson, format!("tensor {name:?}: {error}")))
        })
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = RawTensor;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawTensor, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(JsonText(field)) = map.next_key()? {
            let in_field =
                |error: A::Error| self.refuse(ErrorKind::HeaderJson, format_args!("{field}: {error}"));
            let repeated = match &*field {
                "dtype" => {
                    let JsonText(code) = map.next_value().map_err(in_field)?;
                    let known = Dtype::from_code(&code).ok_or_else(|| {
                        self.refuse(ErrorKind::UnknownDtype, format_args!("unknown dtype {code:?}"))
                    })?;
                    dtype.replace(known).is_some()
                }
                "shape" => {
                    let start = self.dims.len();
                    map.next_value_seed(Shape(self.dims)).map_err(|error| {
                        let what = format!("tensor {:?}: shape: {error}", self.name);
                        fail_with(self.slot, malformed(ErrorKind::HeaderJson, what))
                    })?;
                    shape.replace(ArenaRange::new(start, self.dims.len())).is_some()
                }
                "data_offsets" => {
                    let pair: (u64, u64) = map.next_value().map_err(in_field)?;
                    offsets.replace(pair).is_some()
                }
                _ => {
                    map.next_value::<IgnoredValue>().map_err(in_field)?;
                    false
                }
            };
            if repeated {
                return Err(
                    self.refuse(ErrorKind::Duplicate, format_args!("the field {field:?} stands twice"))
                );
            }
        }
        let missing =
            |field| self.refuse(ErrorKind::HeaderJson, format_args!("the field {field:?} is missing"));
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let (begin, end) = offsets.ok_or_else(|| missing("data_offsets"))?;
        Ok(RawTensor { dtype, shape, begin, end })
    }
}

/// A shape, whose dimensions are appended to the arena.
struct Shape<'h>(&'h mut Vec<u64>);

impl<'de> DeserializeSeed<'de> for Shape<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Shape<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of non-negative integers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(dim) = seq.next_element()? {
            self.0.push(dim);
        }
        Ok(())
    }
}
