//! The chunks of distributed tensors, in the files that `torch.distributed.checkpoint` writes: one or several for each
//! process, with the position of each chunk in the metadata.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display};
use std::ops::Range;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::format::header::tensor_nbytes;
use crate::format::json::{IgnoredValue, JsonText};
use crate::read::file::TensorFile;
use crate::sys::raw_bytes::RawBytes;

/// The metadata key of the positions: `{"NAME": {"saved_offsets": [0, 128]}}`.
const POSITIONS_KEY: &str = "DCP_SHARDING_INFO";

const OFFSETS_KEY: &str = "saved_offsets";

/// The shape of the whole tensor, which only our own files have.
const SHAPE_KEY: &str = "shape";

/// A tensor, and the chunks that are all of it.
#[derive(Debug)]
pub(super) struct ChunkedTensor<'f> {
    pub(super) name: &'f str,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    /// Not empty, unless the tensor is. They do not overlap.
    chunks: Vec<Chunk<'f>>,
}

/// A box of the elements of a tensor, in row-major order.
#[derive(Debug)]
struct Chunk<'f> {
    file: &'f TensorFile,
    /// Its index in the file.
    index: usize,
    /// The first element, in each dimension of the tensor.
    offsets: Vec<u64>,
    shape: &'f [u64],
    /// The bytes from one index to the next, in each dimension.
    strides: Vec<usize>,
    bytes: RawBytes<'f>,
}

impl<'f> ChunkedTensor<'f> {
    /// Returns the tensors of `files`, which were opened by their paths and mapped, sorted by name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::HeaderJson`] if a file has no valid positions; [`ErrorKind::Offsets`] if the chunks of a tensor
    /// overlap, or do not cover it, or have several dtypes or numbers of dimensions.
    pub(super) fn of_files(files: &'f [TensorFile]) -> Result<Vec<ChunkedTensor<'f>>> {
        let mut by_name: BTreeMap<&str, ChunkedTensor<'f>> = BTreeMap::new();
        for file in files {
            let positions = positions(file)?;
            for (index, info) in file.header().iter().enumerate() {
                let invalid = |what: &dyn Display| invalid(file, info.name, what);
                let Some(Position { offsets, shape }) = positions.get(info.name) else {
                    return Err(invalid(&format_args!("{POSITIONS_KEY} does not list it")));
                };
                if offsets.len() != info.shape.len() {
                    let what = format!("{} offsets for {} dimensions", offsets.len(), info.shape.len());
                    return Err(invalid(&what));
                }
                let tensor = by_name.entry(info.name).or_insert_with(|| ChunkedTensor {
                    name: info.name,
                    dtype: info.dtype,
                    shape: vec![0; info.shape.len()],
                    chunks: Vec::new(),
                });
                if (tensor.dtype, tensor.shape.len()) != (info.dtype, info.shape.len()) {
                    return Err(invalid(
                        &"another file has a chunk of another dtype or number of dimensions",
                    ));
                }
                if info.dtype.bits() % 8 != 0 && offsets.iter().any(|&offset| offset > 0) {
                    return Err(invalid(&format_args!("chunks of {} may begin inside a byte", info.dtype)));
                }
                if shape.as_ref().is_some_and(|shape| shape.len() != info.shape.len()) {
                    return Err(invalid(&format_args!("its whole {SHAPE_KEY} has other dimensions")));
                }
                for (size, &whole) in tensor.shape.iter_mut().zip(shape.iter().flatten()) {
                    *size = whole.max(*size);
                }
                for ((size, &offset), &length) in tensor.shape.iter_mut().zip(offsets).zip(info.shape) {
                    let end = offset.checked_add(length).ok_or_else(|| invalid(&"an offset overflows"))?;
                    *size = end.max(*size);
                }
                if info.nbytes() == 0 {
                    continue;
                }
                let start = file.data_ptr(&info).expect("the file is mapped");
                // SAFETY: `RawBytes::new` requires bytes that are valid during `'f`. The header was checked against the
                // length of the mapping, which `file` keeps.
                let bytes = unsafe { RawBytes::new(start, info.nbytes() as usize) };
                let strides = strides(info.dtype, info.shape);
                let offsets = offsets.clone();
                tensor.chunks.push(Chunk { file, index, offsets, shape: info.shape, strides, bytes });
            }
        }
        let tensors: Vec<ChunkedTensor<'f>> = by_name.into_values().collect();
        tensors.iter().try_for_each(ChunkedTensor::check)?;
        Ok(tensors)
    }

    /// Returns an error unless each element is in one chunk.
    fn check(&self) -> Result<()> {
        let needed = tensor_nbytes(self.name, self.dtype, &self.shape)?;
        // Sorted in the dimension with the most different offsets, few chunks are neighbours of each.
        let different = |dim: &usize| {
            let mut offsets: Vec<u64> = self.chunks.iter().map(|chunk| chunk.offsets[*dim]).collect();
            offsets.sort_unstable();
            offsets.dedup();
            offsets.len()
        };
        let along = (0..self.shape.len()).max_by_key(different);
        let mut sorted: Vec<&Chunk<'f>> = self.chunks.iter().collect();
        sorted.sort_by_key(|chunk| along.map(|dim| chunk.offsets[dim]));
        let mut open: Vec<&Chunk<'f>> = Vec::new();
        for chunk in sorted {
            if let Some(dim) = along {
                open.retain(|before| before.range(dim).end > chunk.offsets[dim]);
            }
            if let Some(before) = open.iter().find(|before| before.overlaps(chunk)) {
                let other = path(before.file).display();
                let what =
                    format!("its chunk overlaps that in {other}; remove the files of an older checkpoint");
                return Err(invalid(chunk.file, self.name, &what));
            }
            open.push(chunk);
        }
        let found: u64 = self.chunks.iter().map(|chunk| chunk.bytes.len() as u64).sum();
        if found != needed {
            let detail = format!(
                "tensor {:?} of shape {:?}: the files have {found} of its {needed} bytes; a file of the checkpoint is \
                 missing: fetch it again, or save again",
                self.name, self.shape
            );
            return Err(Error::new(ErrorKind::Offsets, detail));
        }
        Ok(())
    }

    /// Brings the chunks into memory, so that reading them has no errors.
    ///
    /// # Errors
    ///
    /// Those of [`TensorFile::prefault_tensor`].
    pub(super) fn prefault(&self) -> Result<()> {
        self.chunks.iter().try_for_each(|chunk| chunk.file.prefault_tensor(chunk.index))
    }

    /// Calls `write` with the bytes of the tensor, in their order, in the longest runs that the chunks have.
    pub(super) fn for_each_run(&self, mut write: impl FnMut(RawBytes<'f>) -> Result<()>) -> Result<()> {
        let chunks: Vec<&Chunk<'f>> = self.chunks.iter().collect();
        match chunks[..] {
            [] => Ok(()),
            [one] => write(one.bytes),
            _ => walk(&segments(&chunks, 0), &mut Vec::new(), &mut write),
        }
    }
}

impl Chunk<'_> {
    fn range(&self, dim: usize) -> Range<u64> {
        self.offsets[dim]..self.offsets[dim] + self.shape[dim]
    }

    fn overlaps(&self, other: &Chunk<'_>) -> bool {
        (0..self.shape.len()).all(|dim| {
            let (one, two) = (self.range(dim), other.range(dim));
            one.start < two.end && two.start < one.end
        })
    }
}

/// Indices of one dimension that the same chunks have.
struct Segment<'c, 'f> {
    range: Range<u64>,
    content: Content<'c, 'f>,
}

enum Content<'c, 'f> {
    /// One chunk has all elements at these indices.
    Chunk(&'c Chunk<'f>),
    /// Each index has these segments of the next dimension.
    Inner(Vec<Segment<'c, 'f>>),
}

/// Divides the dimension `dim` of the elements that `chunks` have.
fn segments<'c, 'f>(chunks: &[&'c Chunk<'f>], dim: usize) -> Vec<Segment<'c, 'f>> {
    let mut bounds: Vec<u64> =
        chunks.iter().map(|chunk| chunk.range(dim)).flat_map(|range| [range.start, range.end]).collect();
    bounds.sort_unstable();
    bounds.dedup();
    let segments = bounds.windows(2).map(|bounds| {
        let range = bounds[0]..bounds[1];
        let holds = |chunk: &&&Chunk<'f>| {
            let held = chunk.range(dim);
            held.start <= range.start && range.end <= held.end
        };
        let inside: Vec<&Chunk<'f>> = chunks.iter().filter(holds).copied().collect();
        let content = match inside[..] {
            [one] => Content::Chunk(one),
            _ => Content::Inner(segments(&inside, dim + 1)),
        };
        Segment { range, content }
    });
    segments.collect()
}

/// Calls `write` with the bytes of `segments`; `at` has an index for each dimension before theirs.
fn walk<'f>(
    segments: &[Segment<'_, 'f>],
    at: &mut Vec<u64>,
    write: &mut impl FnMut(RawBytes<'f>) -> Result<()>,
) -> Result<()> {
    let dim = at.len();
    for Segment { range, content } in segments {
        match content {
            Content::Chunk(chunk) => {
                let outer = at.iter().zip(&chunk.offsets).zip(&chunk.strides);
                let outer = outer.map(|((&at, &offset), &stride)| (at - offset) as usize * stride);
                let begin =
                    outer.sum::<usize>() + (range.start - chunk.offsets[dim]) as usize * chunk.strides[dim];
                let length = (range.end - range.start) as usize * chunk.strides[dim];
                write(chunk.bytes.part(begin..begin + length))?;
            }
            Content::Inner(inner) => {
                for index in range.clone() {
                    at.push(index);
                    walk(inner, at, write)?;
                    at.pop();
                }
            }
        }
    }
    Ok(())
}

/// Returns the bytes from one index to the next in each dimension.
fn strides(dtype: Dtype, shape: &[u64]) -> Vec<usize> {
    let mut stride = dtype.bits() as usize / 8;
    let mut strides = vec![0; shape.len()];
    for (place, &size) in strides.iter_mut().zip(shape).rev() {
        *place = stride;
        stride *= size as usize;
    }
    strides
}

/// Where a chunk is in its tensor, and the shape of that.
struct Position {
    offsets: Vec<u64>,
    shape: Option<Vec<u64>>,
}

/// Returns the position of each chunk in a file.
fn positions<'f>(file: &'f TensorFile) -> Result<HashMap<Cow<'f, str>, Position>> {
    let fail = |what: &dyn Display| {
        let detail = format!("not a file of torch.distributed.checkpoint: {what}; load it as it is");
        Err(Error::new(ErrorKind::HeaderJson, detail).in_file(path(file)))
    };
    let Some(text) = file.header().metadata().and_then(|metadata| metadata.get(POSITIONS_KEY)) else {
        return fail(&format_args!("its metadata lacks {POSITIONS_KEY}"));
    };
    let parsed: HashMap<JsonText<'f>, Entry> = match serde_json::from_str(text) {
        Ok(parsed) => parsed,
        Err(error) => return fail(&format_args!("{POSITIONS_KEY} is invalid: {error}")),
    };
    let mut positions = HashMap::with_capacity(parsed.len());
    for (name, Entry { offsets, shape }) in parsed {
        match offsets {
            Some(offsets) => positions.insert(name.0, Position { offsets, shape }),
            None => return fail(&format_args!("{POSITIONS_KEY} has no {OFFSETS_KEY} of {:?}", name.0)),
        };
    }
    Ok(positions)
}

/// The entry of one chunk. A `serde_json::Value` for each takes longer than all else.
#[derive(Default)]
struct Entry {
    offsets: Option<Vec<u64>>,
    shape: Option<Vec<u64>>,
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Entry, D::Error> {
        struct EntryVisitor;

        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the position of a chunk")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entry, A::Error> {
                let mut entry = Entry::default();
                while let Some(JsonText(key)) = map.next_key()? {
                    match key.as_ref() {
                        OFFSETS_KEY => entry.offsets = Some(map.next_value()?),
                        SHAPE_KEY => entry.shape = Some(map.next_value()?),
                        _ => {
                            map.next_value::<IgnoredValue>()?;
                        }
                    }
                }
                Ok(entry)
            }
        }

        deserializer.deserialize_map(EntryVisitor)
    }
}

fn invalid(file: &TensorFile, name: &str, what: &dyn Display) -> Error {
    Error::new(ErrorKind::Offsets, format!("tensor {name:?}: {what}")).in_file(path(file))
}

fn path(file: &TensorFile) -> &Path {
    file.path().expect("the file was opened by its path")
}
