//! The error type of the crate. Each kind has a number in the C header, which is never reused.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error, with the file that it concerns, if any.
///
/// `Display` writes one line: the file, the tensor or field, what is wrong, and what to do.
///
/// ```
/// use safetensors_torch::{Error, ErrorKind};
///
/// let error = Error::new(ErrorKind::BufferSize, "buffer has 3 bytes, but the tensor has 4; pass a larger one");
/// let error = error.in_file("model.safetensors".as_ref());
/// assert!(error.to_string().starts_with("model.safetensors: buffer has 3 bytes"));
/// assert_eq!(error.code(), 19);
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    detail: String,
    path: Option<PathBuf>,
    source: Option<io::Error>,
}

macro_rules! kinds {
    ($( $(#[$doc:meta])* $variant:ident = $number:literal; )*) => {
        /// The kind of an error. The discriminant is the number in the C header.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub enum ErrorKind {
            $( $(#[$doc])* $variant = $number, )*
        }

        impl ErrorKind {
            /// Every kind, by number.
            pub const ALL: &'static [ErrorKind] = &[ $( ErrorKind::$variant, )* ];
        }
    };
}

kinds! {
    /// An argument is not allowed.
    InvalidArgument = 1;
    /// The operating system reported an error; see [`Error::os_error`].
    Io = 2;
    /// The file has fewer than the 8 bytes of the header length.
    FileTooSmall = 3;
    /// The header has more than 100,000,000 bytes.
    HeaderTooLarge = 4;
    /// The header runs past the end of the file.
    HeaderTruncated = 5;
    /// The file has another format: a Git LFS pointer, an HTML page, a zip, a pickle.
    ForeignFormat = 6;
    /// The header is not UTF-8.
    HeaderUtf8 = 7;
    /// The header is not the JSON that the format requires.
    HeaderJson = 8;
    /// A name, a field or a metadata key is duplicated.
    Duplicate = 9;
    /// The format does not define the dtype code.
    UnknownDtype = 10;
    /// The elements, bytes or strides of a shape do not fit in 63 bits.
    ShapeOverflow = 11;
    /// The offsets do not span the bytes that dtype and shape require.
    SizeMismatch = 12;
    /// The offsets are reversed, overlap, or leave a hole.
    Offsets = 13;
    /// The data ends before the last tensor, or continues after it.
    DataLength = 14;
    /// No tensor has the name.
    TensorNotFound = 15;
    /// A tensor is named `__metadata__`.
    ReservedName = 16;
    /// The format, or the tensor library, does not support the dtype.
    UnsupportedDtype = 17;
    /// A slice is outside the tensor, has step 0, or splits a byte.
    Slice = 18;
    /// The caller's buffer has the wrong size.
    BufferSize = 19;
    /// The file was closed.
    Closed = 20;
    /// The file was truncated, replaced or written while it was open or edited.
    FileChanged = 21;
    /// A panic was caught at the C boundary: a bug in this library.
    Panic = 22;
    /// The index of a checkpoint is malformed, names a file outside its directory, or does not match its shards; or a
    /// directory contains no checkpoint.
    Index = 23;
}

/// The maximum length of a text in an error. Names come from files, and a caller may pass the contents of a file as a path.
const MAX_TEXT_BYTES: usize = 4096;

/// Returns `text` without the middle of a long one: the beginning says what is wrong, the end what to do.
fn shortened(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_TEXT_BYTES {
        return Cow::Borrowed(text);
    }
    let end = (0..=MAX_TEXT_BYTES / 2).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let start = (text.len() - MAX_TEXT_BYTES / 2..text.len()).find(|&at| text.is_char_boundary(at));
    let start = start.unwrap_or(text.len());
    Cow::Owned(format!("{}... ({} bytes left out) ...{}", &text[..end], start - end, &text[start..]))
}

/// Returns a path for an error text. One without characters would be invisible.
fn display_path(path: &Path) -> String {
    match path.to_string_lossy() {
        text if text.is_empty() => "\"\"".to_owned(),
        text => shortened(&text).into_owned(),
    }
}

impl Error {
    /// Creates an error of `kind`; `detail` says which tensor or field, what is wrong, and what to do.
    pub fn new(kind: ErrorKind, detail: impl Into<String>) -> Error {
        let detail = shortened(&detail.into()).into_owned();
        Error { kind, detail, path: None, source: None }
    }

    /// Creates the error for a system call that failed to `action` ("read", "create") the file at `path`.
    pub fn io(action: &str, path: &Path, source: io::Error) -> Error {
        let detail = match source.kind() {
            io::ErrorKind::NotFound => format!("No such file or directory: {}", display_path(path)),
            _ => format!("cannot {action} {}: {source}", display_path(path)),
        };
        let error = Error { kind: ErrorKind::Io, detail, path: None, source: Some(source) };
        match error.os_error() {
            Some(libc::EMFILE) => error.with_remedy(&format!(
                "this process has as many files open as it may ({}): close some, or raise the limit (ulimit -n)",
                max_open_files()
            )),
            Some(libc::ENOENT) if action.starts_with("create") => error.with_remedy("create its directory first"),
            Some(libc::EISDIR) if action == "create" => error.with_remedy("name a file in it"),
            _ => error,
        }
    }

    #[must_use]
    pub(crate) fn with_remedy(mut self, remedy: &str) -> Error {
        self.detail = format!("{}; {remedy}", self.detail);
        self
    }

    /// Sets the error of the operating system that caused this one.
    #[must_use]
    pub fn with_os_error(mut self, source: io::Error) -> Error {
        self.source = Some(source);
        self
    }

    /// Sets the file that the error concerns, unless the error already names one.
    #[must_use]
    pub fn in_file(mut self, path: &Path) -> Error {
        if self.path.is_none() && self.kind != ErrorKind::Io {
            self.path = Some(path.to_path_buf());
        }
        self
    }

    /// As [`Error::in_file`], for a file that the program reads by its own means: its errors of the kind [`ErrorKind::Io`] do
    /// not name it.
    #[must_use]
    pub(crate) fn in_source(self, name: &Path) -> Error {
        let path = self.path.or_else(|| Some(name.to_path_buf()));
        Error { path, ..self }
    }

    /// Returns the kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the number of the error in the C header.
    pub fn code(&self) -> i32 {
        self.kind as i32
    }

    /// Returns the `errno` of an [`ErrorKind::Io`] that the operating system reported.
    pub fn os_error(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// Returns how many files this process may have open.
fn max_open_files() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` outlives the call, which writes only to it.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", Visible(&display_path(path)))?;
        }
        Visible(&self.detail).fmt(f)
    }
}

/// Text in which names of files, and texts of a server, cannot control a terminal: their control characters are escaped, as
/// those of quoted names already are.
struct Visible<'a>(&'a str);

impl fmt::Display for Visible<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for piece in self.0.split_inclusive(is_invisible) {
            let last = piece.chars().next_back().filter(|&last| is_invisible(last));
            f.write_str(&piece[..piece.len() - last.map_or(0, char::len_utf8)])?;
            last.map_or(Ok(()), |last| write!(f, "{}", last.escape_debug()))?;
        }
        Ok(())
    }
}

/// Returns whether a character can control a terminal or the direction of text, ends a line, or has no width.
fn is_invisible(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(character, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
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
    fn numbers_have_no_gap() {
        for (index, kind) in ErrorKind::ALL.iter().enumerate() {
            assert_eq!(*kind as usize, index + 1);
        }
    }

    #[test]
    fn long_texts_are_shortened() {
        let name = "n".repeat(1_000_000);
        let detail = format!("tensor {name:?}: dtype \"é\"; convert it");
        let error = Error::new(ErrorKind::UnsupportedDtype, detail).in_file(Path::new(&name)).to_string();
        assert!(error.len() < 3 * MAX_TEXT_BYTES, "{}", error.len());
        assert!(error.starts_with("nnn") && error.ends_with("dtype \"é\"; convert it"), "{error}");
        let error = Error::io("open", Path::new(&name), io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        assert!(error.to_string().len() < 2 * MAX_TEXT_BYTES);
        assert!(error.to_string().ends_with("File name too long (os error 36)"), "{error}");
    }

    #[test]
    fn texts_are_shortened_between_characters() {
        for length in MAX_TEXT_BYTES - 3..MAX_TEXT_BYTES + 9 {
            let text = format!("{}{}", "x".repeat(length % 3), "é".repeat(length));
            let cut = shortened(&text);
            assert!(
                cut.len() < MAX_TEXT_BYTES + 50
                    && cut.chars().zip(text.chars()).take(1_000).all(|(left, right)| left == right),
                "{length}"
            );
        }
        assert_eq!(shortened("short"), "short");
    }

    #[test]
    fn control_characters_are_escaped() {
        let odd = "a\\\"\u{1b}[31m\n\u{9b}\u{202e}é\u{200b}\u{2028}\0z";
        let escaped = r#"a\"\u{1b}[31m\n\u{9b}\u{202e}é\u{200b}\u{2028}\0z"#;
        let error = Error::new(ErrorKind::HeaderJson, odd).in_file(Path::new(odd));
        assert_eq!(error.to_string(), format!("{escaped}: {escaped}"));
        let missing = Error::io("open", Path::new(odd), io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(missing.to_string(), format!("No such file or directory: {escaped}"));
        let every: String = ('\0'..=char::MAX).filter(|&character| is_invisible(character)).collect();
        let shown = Visible(&every).to_string();
        assert!(shown.is_ascii() && !shown.contains(char::is_control), "{shown}");
        // Quoted names escape all of them too.
        assert!(every.chars().all(|character| character.escape_debug().count() > 1), "{every:?}");
    }

    #[test]
    fn the_first_file_is_kept() {
        let error = Error::new(ErrorKind::HeaderJson, "bad").in_file(Path::new("x")).in_file(Path::new("y"));
        assert_eq!(error.to_string(), "x: bad");
    }
}
