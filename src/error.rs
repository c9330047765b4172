//! The one error type: what went wrong, with which file and tensor, and what to do about it.
//!
//! Each variant has a number in the C header, which is never reused.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// An error, and the file that it happened in where there is one.
///
/// `Display` gives one line for a person: the file, then the tensor or field, the fault, and the remedy.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    detail: String,
    path: Option<PathBuf>,
    source: Option<io::Error>,
}

macro_rules! kinds {
    ($( $(#[$doc:meta])* $variant:ident = $number:literal; )*) => {
        /// The kinds of error. The discriminant is the number in the C header.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub enum ErrorKind {
            $( $(#[$doc])* $variant = $number, )*
        }

        impl ErrorKind {
            /// Every kind, in the order of the numbers.
            pub const ALL: &'static [ErrorKind] = &[ $( ErrorKind::$variant, )* ];
        }
    };
}

kinds! {
    /// An argument that no call of this kind takes.
    InvalidArgument = 1;
    /// The operating system refused; [`Error::os_error`] says why.
    Io = 2;
    /// Fewer than the 8 bytes of the header length.
    FileTooSmall = 3;
    /// A header of more than 100,000,000 bytes.
    HeaderTooLarge = 4;
    /// The header runs past the end of the file.
    HeaderTruncated = 5;
    /// The bytes are of another format: a Git LFS pointer, an HTML page, a zip, a pickle.
    ForeignFormat = 6;
    /// The header is not UTF-8.
    HeaderUtf8 = 7;
    /// The header is not the JSON that the format asks for.
    HeaderJson = 8;
    /// A name, a field or a metadata key that stands twice.
    Duplicate = 9;
    /// A dtype code that the format does not know.
    UnknownDtype = 10;
    /// A shape whose number of elements, bytes or strides does not fit in 63 bits.
    ShapeOverflow = 11;
    /// Offsets that do not span the bytes which dtype and shape need.
    SizeMismatch = 12;
    /// Offsets that are reversed, overlap, or leave a hole.
    Offsets = 13;
    /// Data that ends before the last tensor does, or goes on behind it.
    DataLength = 14;
    /// No tensor of that name.
    TensorNotFound = 15;
    /// A tensor called `__metadata__`.
    ReservedName = 16;
    /// A dtype that the format, or the tensor library, cannot hold.
    UnsupportedDtype = 17;
    /// A slice outside the tensor, of step 0, or that splits a byte.
    Slice = 18;
    /// A caller's buffer of the wrong size.
    BufferSize = 19;
    /// The file was closed.
    Closed = 20;
    /// The file became shorter, was replaced or was written to while it was open or edited.
    FileChanged = 21;
    /// A panic, stopped at the C boundary: a bug of this library.
    Panic = 22;
    /// The index of a checkpoint that is malformed, names a file outside its directory, or does not fit its shards; or a
    /// directory in which no checkpoint is to be found.
    Index = 23;
}

/// The most bytes of one text that an error shows: names come from files, and paths from callers who may pass the
/// contents of a file for its name.
const MOST_SHOWN: usize = 4096;

/// `text`, without the middle of a long one: its beginning names what is wrong, its end what to do.
fn shortened(text: &str) -> Cow<'_, str> {
    if text.len() <= MOST_SHOWN {
        return Cow::Borrowed(text);
    }
    let end = (0..=MOST_SHOWN / 2).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let start = (text.len() - MOST_SHOWN / 2..text.len()).find(|&at| text.is_char_boundary(at));
    let start = start.unwrap_or(text.len());
    Cow::Owned(format!("{}... ({} bytes left out) ...{}", &text[..end], start - end, &text[start..]))
}

/// The path as text, shortened.
fn shown(path: &Path) -> String {
    shortened(&path.to_string_lossy()).into_owned()
}

impl Error {
    /// An error of `kind`; `detail` names the tensor or field, the fault and the remedy.
    pub fn new(kind: ErrorKind, detail: impl Into<String>) -> Error {
        let detail = shortened(&detail.into()).into_owned();
        Error { kind, detail, path: None, source: None }
    }

    /// The operating system's refusal to do `action` ("read", "create") with the file at `path`.
    pub fn io(action: &str, path: &Path, source: io::Error) -> Error {
        let detail = match source.kind() {
            io::ErrorKind::NotFound => format!("No such file or directory: {}", shown(path)),
            _ => format!("cannot {action} {}: {source}", shown(path)),
        };
        let error = Error { kind: ErrorKind::Io, detail, path: None, source: Some(source) };
        match error.os_error() {
            Some(libc::EMFILE) => error.with_remedy(&format!(
                "this process has as many files open as it may ({}): close some, or raise the limit (ulimit -n)",
                most_open_files()
            )),
            _ => error,
        }
    }

    /// The same error, with what there is to know or to do about it.
    #[must_use]
    pub(crate) fn with_remedy(mut self, remedy: &str) -> Error {
        self.detail = format!("{}; {remedy}", self.detail);
        self
    }

    /// The same error, raised by the operating system with `source`.
    #[must_use]
    pub(crate) fn with_os_error(mut self, source: io::Error) -> Error {
        self.source = Some(source);
        self
    }

    /// The same error, said of the file at `path`. An error that names its file already stays as it is.
    #[must_use]
    pub fn in_file(mut self, path: &Path) -> Error {
        if self.path.is_none() && self.kind != ErrorKind::Io {
            self.path = Some(path.to_path_buf());
        }
        self
    }

    /// What kind of error this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The number of this error in the C header.
    pub fn code(&self) -> i32 {
        self.kind as i32
    }

    /// `errno`, for an error of kind [`ErrorKind::Io`] that the operating system raised.
    pub fn os_error(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// How many files this process may have open.
fn most_open_files() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives during the call, which writes to it alone. It cannot fail for a resource that there is.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", shown(path))?;
        }
        f.write_str(&self.detail)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_run_without_a_gap() {
        for (index, kind) in ErrorKind::ALL.iter().enumerate() {
            assert_eq!(*kind as usize, index + 1);
        }
    }

    #[test]
    fn a_missing_file_reads_as_python_says_it() {
        let missing = io::Error::from_raw_os_error(libc::ENOENT);
        let error = Error::io("open", Path::new("a/b"), missing);
        assert_eq!(error.to_string(), "No such file or directory: a/b");
        assert_eq!(error.os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn long_texts_are_shortened() {
        let name = "n".repeat(1_000_000);
        let detail = format!("tensor {name:?}: dtype \"é\"; convert it");
        let error = Error::new(ErrorKind::UnsupportedDtype, detail).in_file(Path::new(&name)).to_string();
        assert!(error.len() < 3 * MOST_SHOWN, "{}", error.len());
        assert!(error.starts_with("nnn") && error.ends_with("dtype \"é\"; convert it"), "{error}");
        let error = Error::io("open", Path::new(&name), io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        assert!(error.to_string().len() < 2 * MOST_SHOWN);
        assert!(error.to_string().ends_with("File name too long (os error 36)"), "{error}");
    }

    #[test]
    fn texts_are_cut_between_characters() {
        for length in MOST_SHOWN - 3..MOST_SHOWN + 9 {
            let text = format!("{}{}", "x".repeat(length % 3), "é".repeat(length));
            let cut = shortened(&text);
            assert!(
                cut.len() < MOST_SHOWN + 50
                    && cut.chars().zip(text.chars()).take(1_000).all(|(shown, whole)| shown == whole),
                "{length}"
            );
        }
        assert_eq!(shortened("short"), "short");
    }

    #[test]
    fn the_file_is_named_once() {
        let error = Error::new(ErrorKind::HeaderJson, "bad").in_file(Path::new("x")).in_file(Path::new("y"));
        assert_eq!(error.to_string(), "x: bad");
    }
}
