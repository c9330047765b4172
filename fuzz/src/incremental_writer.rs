//! Incremental writers: tensors written whole, in parts, or appended, in any order, with some invalid calls. A record
//! of the written bytes predicts the result of each call. The old file stays until the commit; then the file has the
//! bytes of a save.

use std::fs;
use std::path::Path;

use arbitrary::{Result, Unstructured};
use safetensors_torch::{Dtype, Error, ErrorKind, IncrementalWriter, SaveOptions, TensorSpec, save_into};

use crate::directory::{assert_alone, replace, with_path};
use crate::tensors::{self, Input};

const OLD: &[u8] = b"the old file";

/// The largest total size of the tensors.
const MAX_BYTES: u128 = 1 << 14;

/// A call. Tensors are identified by their index, which may be out of range.
#[derive(Debug)]
enum Call {
    /// Writes all bytes, or too many or too few.
    Whole {
        tensor: usize,
        extra: i8,
    },
    Part {
        tensor: usize,
        offset: u64,
        length: usize,
    },
    /// Appends pieces of a size, a number of times; then finishes or abandons the tensor.
    Pieces {
        tensor: usize,
        piece: usize,
        count: usize,
        finish: bool,
    },
    /// Writes with another dtype or shape than declared.
    Mismatched {
        tensor: usize,
    },
    Commit,
    Discard,
}

/// The bytes of a tensor that the writer must have accepted.
struct Written {
    bytes: Vec<bool>,
    /// Whether an empty tensor was written.
    is_written: bool,
}

/// An incremental writer and its expected state.
struct Session<'i> {
    writer: IncrementalWriter,
    specs: &'i [TensorSpec<'i>],
    data: &'i [Vec<u8>],
    written: Vec<Written>,
    is_open: bool,
    is_there: bool,
}

/// Runs the target on tensors and calls derived from `bytes`.
pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let Ok(input) = tensors::input(&mut u) else { return };
    let bits = input.tensors.iter().map(tensors::Tensor::bits).collect::<Option<Vec<_>>>();
    let is_small = bits.is_some_and(|bits| bits.into_iter().sum::<u128>() <= MAX_BYTES * 8);
    let calls = (0..u.int_in_range(0..=24).unwrap_or(0)).map(|_| call(&mut u)).collect::<Result<Vec<_>>>();
    let (true, Ok(calls)) = (is_small, calls) else { return };
    with_path("f.safetensors", |path, _| check(path, &input, &calls));
}

fn call(u: &mut Unstructured<'_>) -> Result<Call> {
    let tensor = u.int_in_range(0..=8)?;
    Ok(match u.int_in_range(0..=15)? {
        0 => Call::Commit,
        1 if u.ratio(1, 8)? => Call::Discard,
        1 => Call::Mismatched { tensor },
        2..=6 => Call::Whole { tensor, extra: if u.ratio(1, 8)? { u.arbitrary()? } else { 0 } },
        7..=10 => Call::Pieces {
            tensor,
            piece: u.int_in_range(0..=64)?,
            count: u.int_in_range(0..=8)?,
            finish: u.ratio(3, 4)?,
        },
        _ => {
            let offset = if u.ratio(1, 16)? { u.arbitrary()? } else { u.int_in_range(0..=64)? };
            Call::Part { tensor, offset, length: u.int_in_range(0..=64)? }
        }
    })
}

fn check(path: &Path, input: &Input, calls: &[Call]) {
    let specs: Vec<TensorSpec> = input.tensors.iter().map(tensors::Tensor::spec).collect();
    let options = SaveOptions { alignment: input.alignment, durable: false };
    replace(path, OLD);
    let faults = tensors::faults(input);
    let writer = match IncrementalWriter::create(&specs, input.metadata.as_ref(), path, options) {
        Ok(writer) => writer,
        Err(error) => {
            assert!(faults.contains(&error.kind()), "{input:?}: {error}, not one of {faults:?}");
            return assert_old(path);
        }
    };
    assert!(faults.is_empty(), "{input:?} was accepted in spite of {faults:?}");
    let data: Vec<Vec<u8>> = input.tensors.iter().map(tensors::Tensor::data).collect();
    let written =
        data.iter().map(|data| Written { bytes: vec![false; data.len()], is_written: false }).collect();
    let mut session = Session { writer, specs: &specs, data: &data, written, is_open: true, is_there: false };
    for call in calls {
        session.call(call);
        assert_eq!(session.writer.is_open(), session.is_open, "{input:?} {calls:?}");
        if session.is_open {
            session.check_missing();
        }
        if !session.is_there {
            assert_old(path);
        }
    }
    // A third of the writers are dropped without a commit.
    if session.is_open && !calls.len().is_multiple_of(3) {
        session.complete();
        session.call(&Call::Commit);
        assert!(session.is_there, "{input:?} {calls:?}");
    }
    let Session { writer, is_there, .. } = session;
    drop(writer);
    if !is_there {
        return assert_old(path);
    }
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let written = fs::read(path).expect("written");
    let mut expected = vec![0xAA; written.len()];
    save_into(&specs, &slices, input.metadata.as_ref(), &mut expected, input.alignment).expect("as long");
    assert!(written == expected, "{input:?} {calls:?}: other bytes than those of a save");
    assert_alone(path);
}

fn assert_old(path: &Path) {
    assert!(fs::read(path).expect("the old file") == OLD);
}

impl Session<'_> {
    fn call(&mut self, call: &Call) {
        match *call {
            Call::Whole { tensor, extra } => self.write_tensor(tensor, extra),
            Call::Part { tensor, offset, length } => self.part(tensor, offset, length),
            Call::Pieces { tensor, piece, count, finish } => self.pieces(tensor, piece, count, finish),
            Call::Mismatched { tensor } => self.mismatched(tensor),
            Call::Commit => {
                let is_complete = self.missing().is_empty();
                let expected = match (self.is_open, is_complete) {
                    (false, _) => Err(ErrorKind::Closed),
                    (true, false) => Err(ErrorKind::DataLength),
                    (true, true) => Ok(()),
                };
                assert_eq!(self.writer.commit().map_err(|error| error.kind()), expected);
                self.is_there |= expected.is_ok();
                self.is_open &= expected.is_err();
            }
            Call::Discard => {
                self.writer.discard();
                self.is_open = false;
            }
        }
    }

    /// Returns the name of a tensor, or one that was not declared.
    fn name(&self, tensor: usize) -> &str {
        self.specs.get(tensor).map_or("no such tensor", |spec| spec.name)
    }

    fn write_tensor(&mut self, tensor: usize, extra: i8) {
        let mut bytes = self.data.get(tensor).cloned().unwrap_or_default();
        let declared = bytes.len();
        bytes.resize(declared.saturating_add_signed(extra.into()), 7);
        let result = self.writer.write(self.name(tensor), &bytes);
        let is_right = bytes.len() == declared;
        self.check_result(tensor, 0, declared, is_right, result.map_err(|error| error.kind()));
    }

    fn part(&mut self, tensor: usize, offset: u64, length: usize) {
        let all = self.data.get(tensor).map_or(&[][..], Vec::as_slice);
        let range = usize::try_from(offset).ok().and_then(|from| all.get(from..from.checked_add(length)?));
        let bytes = range.map_or_else(|| vec![7; length], <[u8]>::to_vec);
        let is_right = range.is_some();
        let result = self.writer.write_part(self.name(tensor), offset, &bytes);
        self.check_result(tensor, offset as usize, length, is_right, result.map_err(|error| error.kind()));
    }

    /// Appends to a tensor, which reserves all of its bytes until it is abandoned.
    fn pieces(&mut self, tensor: usize, piece: usize, count: usize, finish: bool) {
        let Some(&spec) = self.specs.get(tensor) else { return };
        let data = &self.data[tensor];
        let free = self.is_open && !self.is_taken(tensor, 0, data.len());
        let mut appender = match self.writer.begin(spec) {
            Ok(appender) => appender,
            Err(error) => {
                let expected = if self.is_open { ErrorKind::Duplicate } else { ErrorKind::Closed };
                assert_eq!(error.kind(), expected);
                return assert!(!free);
            }
        };
        assert!(free);
        // Until then, other writes of the tensor and the commit fail.
        let busy = |result: std::result::Result<(), Error>, kind| {
            assert_eq!(result.expect_err("it is being written").kind(), kind);
        };
        busy(self.writer.write(spec.name, data), ErrorKind::Duplicate);
        busy(self.writer.commit(), ErrorKind::InvalidArgument);
        let mut at = 0;
        for _ in 0..count {
            let bytes = data.get(at..at + piece);
            let result = appender.write(bytes.unwrap_or(&vec![7; piece]));
            match bytes {
                Some(_) => result.expect("there is room"),
                None => assert_eq!(result.expect_err("too many").kind(), ErrorKind::BufferSize),
            }
            at += bytes.map_or(0, <[u8]>::len);
        }
        if !finish {
            return drop(appender);
        }
        match appender.finish() {
            Ok(()) => {
                assert_eq!(at, data.len());
                self.mark(tensor, 0, at);
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::BufferSize);
                assert_ne!(at, data.len());
            }
        }
    }

    /// Writes a tensor with another dtype or shape than declared.
    fn mismatched(&self, tensor: usize) {
        let Some(&spec) = self.specs.get(tensor) else { return };
        let dtype = if spec.dtype == Dtype::I64 { Dtype::F32 } else { Dtype::I64 };
        let mut shape = spec.shape.to_vec();
        shape.push(1);
        for other in [TensorSpec { dtype, ..spec }, TensorSpec { shape: &shape, ..spec }] {
            let error = self.writer.begin(other).expect_err("not as declared");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }

    /// Compares the result of a write with the record of written bytes, and updates it.
    fn check_result(
        &mut self,
        tensor: usize,
        from: usize,
        length: usize,
        is_right: bool,
        result: std::result::Result<(), ErrorKind>,
    ) {
        let expected = if tensor >= self.specs.len() {
            Err(ErrorKind::TensorNotFound)
        } else if !is_right {
            Err(ErrorKind::BufferSize)
        } else if !self.is_open {
            Err(ErrorKind::Closed)
        } else if self.is_taken(tensor, from, length) {
            Err(ErrorKind::Duplicate)
        } else {
            Ok(())
        };
        assert_eq!(result, expected, "tensor {tensor}, {length} bytes from {from}");
        if result.is_ok() {
            self.mark(tensor, from, length);
        }
    }

    fn is_taken(&self, tensor: usize, from: usize, length: usize) -> bool {
        let written = &self.written[tensor];
        written.bytes[from..from + length].contains(&true) || (written.bytes.is_empty() && written.is_written)
    }

    fn mark(&mut self, tensor: usize, from: usize, length: usize) {
        let written = &mut self.written[tensor];
        written.bytes[from..from + length].fill(true);
        written.is_written = true;
    }

    /// Returns the names of incomplete tensors.
    fn missing(&self) -> Vec<&str> {
        let is_missing = |written: &Written| written.bytes.contains(&false) || !written.is_written;
        let pairs = self.specs.iter().zip(&self.written);
        pairs.filter(|(_, written)| is_missing(written)).map(|(spec, _)| spec.name).collect()
    }

    fn check_missing(&self) {
        let (mut ours, mut theirs) = (self.missing(), self.writer.missing().expect("this process"));
        ours.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(ours, theirs);
    }

    /// Writes every missing byte, one at a time.
    fn complete(&mut self) {
        for tensor in 0..self.specs.len() {
            if self.data[tensor].is_empty() {
                if !self.written[tensor].is_written {
                    self.write_tensor(tensor, 0);
                }
                continue;
            }
            for at in 0..self.data[tensor].len() {
                if !self.written[tensor].bytes[at] {
                    self.part(tensor, at as u64, 1);
                }
            }
        }
    }
}
