//! Detects other formats, so that the error can say what to do.

use crate::error::{Error, ErrorKind};

/// The signature of another format, its name, and the remedy.
const SIGNATURES: &[(&[u8], &str, &str)] = &[
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive, such as torch.save writes", "load it with torch.load and save it again"),
    (b"\x80\x02", "a pickle, such as older torch.save writes", "load it with torch.load and save it again"),
    (b"\x80\x04", "a pickle", "load it with torch.load and save it again"),
    (b"\x80\x05", "a pickle", "load it with torch.load and save it again"),
    (b"GGUF", "a GGUF model", "convert it to safetensors first"),
    (b"\x93NUMPY", "a NumPy array", "load it with numpy.load and save it again"),
    (b"\x89HDF\r\n", "an HDF5 file", "load it with h5py and save it again"),
    (b"\x1f\x8b", "gzip data", "decompress it first"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "decompress it first"),
    (b"\x7fELF", "an ELF program or library", "check the file name"),
    (b"%PDF", "a PDF document", "check the file name"),
];

/// The beginnings, in lower case, of texts that the Hugging Face hub and GitHub send instead of a file.
const ANSWERS: &[&[u8]] = &[
    b"entry not found",
    b"repository not found",
    b"revision not found",
    b"invalid username or password",
    b"invalid credentials",
    b"access to model ",
    b"access to dataset ",
    b"not found",
    b"404: not found",
    b"unauthorized",
    b"forbidden",
];

/// Returns the error for a file that begins like another format, or `None` if `start` matches none.
pub(crate) fn detect_foreign(start: &[u8]) -> Option<Error> {
    let (what, remedy) = identify(start)?;
    let detail = format!("not a safetensors file: this is {what}; {remedy}");
    Some(Error::new(ErrorKind::ForeignFormat, detail))
}

fn identify(start: &[u8]) -> Option<(&'static str, &'static str)> {
    for (signature, what, remedy) in SIGNATURES {
        if start.starts_with(signature) {
            return Some((what, remedy));
        }
    }
    let text = start.trim_ascii_start();
    let head: Vec<u8> = text.iter().take(32).map(u8::to_ascii_lowercase).collect();
    if ANSWERS.iter().any(|answer| head.starts_with(answer)) {
        return Some((
            "a server's answer instead of the file",
            "the server does not have the file or refuses access: read this text, check the address and the access \
             token, and fetch it again",
        ));
    }
    if head.starts_with(b"<!doctype html") || head.starts_with(b"<html") {
        return Some((
            "an HTML page",
            "the server probably sent a login or error page: fetch the file again",
        ));
    }
    if head.starts_with(b"<?xml") {
        return Some(("an XML document", "the server probably sent an error page: fetch the file again"));
    }
    // JSON from the first byte, without the length before it.
    if matches!(head.first(), Some(b'{' | b'[')) && text.get(1).is_some_and(|b| b"\"{[ \n\r\t}]".contains(b))
    {
        return Some((
            "JSON without the 8 bytes of header length before it",
            "it may be the index of a checkpoint, which is for load_sharded, or a server's error message: open it in an \
             editor",
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_format_and_the_remedy() {
        for (start, expected) in [
            (&b"  <!DOCTYPE HTML><p>"[..], "HTML page"),
            (b"<html lang=en>", "HTML page"),
            (b"PK\x03\x04rest", "torch.load"),
            (b"{\"error\":\"not found\"}", "JSON without"),
            (b"Entry not found", "a server's answer instead of the file"),
            (b"Invalid username or password.", "access token"),
            (b"404: Not Found", "fetch it again"),
            (b"Access to model a/b is restricted and you are not in the authorized list.", "access token"),
        ] {
            let message = detect_foreign(start).expect("known").to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert!(detect_foreign(b"\x40\0\0\0\0\0\0\0{\"a\"").is_none());
        assert!(detect_foreign(b"").is_none());
    }
}
