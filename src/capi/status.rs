//! Names and messages of the status numbers.

use std::ffi::{CStr, c_char};

use super::boundary::boundary;
use super::types::{SFT_OK, sft_status};
use crate::error::ErrorKind;

/// Every status: its number, its name in the header, and a message.
pub const STATUSES: &[(sft_status, &CStr, &CStr)] = {
    use ErrorKind::*;
    &[
        (SFT_OK, c"SFT_OK", c"no error"),
        (InvalidArgument as i32, c"SFT_ERROR_INVALID_ARGUMENT", c"an argument is invalid"),
        (Io as i32, c"SFT_ERROR_IO", c"the operating system reported an error"),
        (FileTooSmall as i32, c"SFT_ERROR_FILE_TOO_SMALL", c"the file is shorter than a header length"),
        (
            HeaderTooLarge as i32,
            c"SFT_ERROR_HEADER_TOO_LARGE",
            c"the header is larger than the format allows",
        ),
        (HeaderTruncated as i32, c"SFT_ERROR_HEADER_TRUNCATED", c"the header runs past the end of the file"),
        (ForeignFormat as i32, c"SFT_ERROR_FOREIGN_FORMAT", c"the file has another format"),
        (HeaderUtf8 as i32, c"SFT_ERROR_HEADER_UTF8", c"the header is not UTF-8"),
        (HeaderJson as i32, c"SFT_ERROR_HEADER_JSON", c"the header is not the JSON that the format requires"),
        (Duplicate as i32, c"SFT_ERROR_DUPLICATE", c"a name, a field or a metadata key occurs twice"),
        (UnknownDtype as i32, c"SFT_ERROR_UNKNOWN_DTYPE", c"the format does not have this dtype"),
        (ShapeOverflow as i32, c"SFT_ERROR_SHAPE_OVERFLOW", c"the shape does not fit in 63 bits"),
        (SizeMismatch as i32, c"SFT_ERROR_SIZE_MISMATCH", c"the data offsets do not fit dtype and shape"),
        (Offsets as i32, c"SFT_ERROR_OFFSETS", c"the data offsets are reversed, overlap or leave a hole"),
        (DataLength as i32, c"SFT_ERROR_DATA_LENGTH", c"the data is shorter or longer than its tensors"),
        (TensorNotFound as i32, c"SFT_ERROR_TENSOR_NOT_FOUND", c"no tensor has this name"),
        (ReservedName as i32, c"SFT_ERROR_RESERVED_NAME", c"the name is reserved for the metadata"),
        (UnsupportedDtype as i32, c"SFT_ERROR_UNSUPPORTED_DTYPE", c"the dtype is not supported here"),
        (Slice as i32, c"SFT_ERROR_SLICE", c"the slice does not fit the tensor"),
        (BufferSize as i32, c"SFT_ERROR_BUFFER_SIZE", c"the buffer has the wrong size"),
        (Closed as i32, c"SFT_ERROR_CLOSED", c"the file is closed"),
        (FileChanged as i32, c"SFT_ERROR_FILE_CHANGED", c"the file changed while it was open or edited"),
        (Panic as i32, c"SFT_ERROR_PANIC", c"a bug of this library"),
        (Index as i32, c"SFT_ERROR_INDEX", c"the index of the checkpoint does not fit its files"),
    ]
};

fn find(status: sft_status) -> Option<&'static (sft_status, &'static CStr, &'static CStr)> {
    STATUSES.iter().find(|(number, ..)| *number == status)
}

#[unsafe(no_mangle)]
pub extern "C" fn sft_status_get_name(status: sft_status) -> *const c_char {
    boundary!(c"".as_ptr(); { find(status).map_or(c"unknown status", |(_, name, _)| name).as_ptr() })
}

#[unsafe(no_mangle)]
pub extern "C" fn sft_status_get_message(status: sft_status) -> *const c_char {
    boundary!(c"".as_ptr(); {
        let unknown = c"a status that this version of the library does not know";
        find(status).map_or(unknown, |(.., message)| message).as_ptr()
    })
}
