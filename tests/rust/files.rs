//! Reading files: backends, tensors, slices, files that change, and misuse. `saving` and `save_targets` test saves.

mod common;
mod save_targets;
mod saving;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{contents, directory, naive_slice, pattern, read, read_slice, saved, with_file};
use safetensors_torch::{
    AxisRange, Backend, Dtype, ErrorKind, Metadata, SaveOptions, TensorFile, TensorSpec, save_file,
};
use tempfile::TempDir;

const BACKENDS: [Backend; 2] = [Backend::Mmap, Backend::Pread];

/// Saves a file of one U8 tensor `a` of this shape, filled with a pattern. Returns its path and the data.
fn one_tensor(directory: &TempDir, shape: &[u64]) -> (PathBuf, Vec<u8>) {
    let data = pattern(shape.iter().product::<u64>() as usize);
    let path = directory.path().join("one.safetensors");
    let spec = TensorSpec { name: "a", dtype: Dtype::U8, shape };
    save_file(&[spec], &[&data], None, &path, SaveOptions::default()).expect("saved");
    (path, data)
}

fn range(start: u64, stop: u64, step: u64) -> AxisRange {
    AxisRange { start, stop, step }
}

#[test]
fn backends_and_memory_agree() {
    let directory = directory();
    let path = directory.path().join("a.safetensors");
    let specs = [
        TensorSpec { name: "scalar", dtype: Dtype::F64, shape: &[] },
        TensorSpec { name: "none", dtype: Dtype::F32, shape: &[0, 7] },
        TensorSpec { name: "bytes\0é", dtype: Dtype::Bool, shape: &[3] },
    ];
    let metadata: Metadata = [("format".to_string(), "pt".to_string())].into();
    let data: [&[u8]; 3] = [&[7; 8], &[], &[1, 0, 1]];
    save_file(&specs, &data, Some(&metadata), &path, SaveOptions::default()).expect("saved");

    let bytes = fs::read(&path).expect("it is there");
    assert_eq!(bytes, saved(&specs, &data, Some(&metadata), 8).expect("saved"));
    let in_memory = with_file(&bytes, contents).expect("valid");
    assert_eq!(in_memory.tensors.len(), 3);
    for backend in BACKENDS {
        let file = TensorFile::open(&path, backend).expect("valid");
        assert_eq!(contents(&file), in_memory);
        assert_eq!(file.path(), Some(path.as_path()));
        for index in 0..3 {
            let tensor = file.tensor(index).expect("three");
            let range = file.byte_range(&tensor);
            let expected = &bytes[range.start as usize..range.end as usize];
            match (backend, file.data_ptr(&tensor)) {
                (Backend::Pread, pointer) => assert_eq!(pointer, None),
                (Backend::Mmap, None) => panic!("a mapping has an address"),
                (Backend::Mmap, Some(start)) => {
                    // SAFETY: the range of a tensor lies in the mapping, which `file` keeps.
                    assert_eq!(unsafe { std::slice::from_raw_parts(start, expected.len()) }, expected);
                }
            }
        }
    }
}

#[test]
fn large_tensors_are_read_completely() {
    // Several chunks of 8 MiB, and a partial one.
    let directory = directory();
    let (path, data) = one_tensor(&directory, &[5, 4_194_304 + 3]);
    for backend in BACKENDS {
        let file = TensorFile::open(&path, backend).expect("valid");
        assert!(read(&file, 0) == data, "{backend:?}");
    }
}

#[test]
fn many_tensors_are_read_in_any_order() {
    let directory = directory();
    let path = directory.path().join("many.safetensors");
    // More adjacent tensors than one vectored read takes, some empty, and more bytes than one thread reads.
    let count = 3000;
    let names: Vec<String> = (0..count).map(|i| format!("{i:04}")).collect();
    let shapes: Vec<[u64; 1]> = (0..count).map(|i| [if i % 7 == 0 { 0 } else { i * 3 % 5000 }]).collect();
    let data: Vec<Vec<u8>> =
        shapes.iter().enumerate().map(|(i, [n])| pattern(i + *n as usize)[i..].to_vec()).collect();
    let specs: Vec<TensorSpec> =
        names.iter().zip(&shapes).map(|(name, shape)| TensorSpec { name, dtype: Dtype::I8, shape }).collect();
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    save_file(&specs, &slices, None, &path, SaveOptions::default()).expect("saved");

    for backend in BACKENDS {
        let file = TensorFile::open(&path, backend).expect("valid");
        let orders: [Vec<usize>; 3] = [
            (0..count as usize).collect(),
            (0..count as usize).rev().collect(),
            (0..count as usize).map(|i| i * 1001 % count as usize).collect(),
        ];
        for order in orders {
            let mut buffers: Vec<Vec<u8>> = order.iter().map(|&i| vec![0xAA; data[i].len()]).collect();
            let requests: Vec<(usize, *mut u8, usize)> = order
                .iter()
                .zip(&mut buffers)
                .map(|(&i, b)| (file.require(&names[i]).expect("saved"), b.as_mut_ptr(), b.len()))
                .collect();
            // SAFETY: every buffer is its own allocation of that length.
            unsafe { file.read_tensors(&requests) }.expect("read");
            for (&i, buffer) in order.iter().zip(&buffers) {
                assert!(*buffer == data[i], "{backend:?}, tensor {i}");
            }
        }
    }
}

#[test]
fn slices_equal_elements_picked_one_by_one() {
    let directory = directory();
    for (shape, ranges) in [
        (vec![], vec![]),
        (vec![10], vec![range(2, 9, 3)]),
        (vec![4, 5, 6], vec![range(0, 4, 1), range(1, 4, 1), range(0, 6, 1)]),
        (vec![4, 5, 6], vec![range(1, 4, 2), range(0, 5, 2), range(1, 6, 2)]),
        (vec![4, 5, 6], vec![range(3, 4, 1), range(2, 3, 9), range(5, 6, 1)]),
        (vec![4, 5, 6], vec![range(0, 4, 1), range(2, 2, 1), range(0, 6, 1)]),
        (vec![3, 1, 7], vec![range(0, 3, 2), range(0, 1, 5), range(0, 7, 1)]),
        // Runs less than a page apart are read together.
        (vec![300, 4000], vec![range(5, 300, 1), range(7, 3500, 1)]),
        (vec![700, 4000], vec![range(0, 700, 1), range(17, 18, 1)]),
        // Runs further apart are read separately.
        (vec![50, 9000], vec![range(1, 50, 2), range(3, 30, 1)]),
        // Both kinds alternate, and a group ends at the limit of one read.
        (vec![40, 2, 6000], vec![range(0, 40, 3), range(0, 2, 1), range(10, 5000, 1)]),
        (vec![3_000_000], vec![range(1, 2_999_999, 2)]),
        // One run exceeds the gather buffer.
        (vec![2, 3_000_000], vec![range(1, 2, 1), range(1, 2_900_001, 1)]),
    ] {
        let (path, data) = one_tensor(&directory, &shape);
        let expected = naive_slice(&data, 1, &shape, &ranges);
        for backend in BACKENDS {
            let file = TensorFile::open(&path, backend).expect("valid");
            let given = read_slice(&file, 0, &ranges).expect("read");
            assert!(given == expected, "{backend:?} {shape:?} {ranges:?}");
        }
    }
}

#[test]
fn a_mapping_is_private() {
    let directory = directory();
    let (path, data) = one_tensor(&directory, &[16]);
    let file = TensorFile::open(&path, Backend::Mmap).expect("valid");
    let mapping = file.mapping().expect("mapped");
    let start = file.byte_range(&file.tensor(0).expect("one")).start as usize;
    // SAFETY: the mapping is writable for its length, and nobody holds a reference into it.
    unsafe { mapping.as_ptr().add(start).write(data[0] ^ 0xFF) };
    assert_eq!(read(&file, 0)[0], data[0] ^ 0xFF);
    let other = TensorFile::open(&path, Backend::Mmap).expect("valid");
    assert_eq!(read(&other, 0), data);
    assert!(fs::read(&path).expect("there").ends_with(&data));
}

#[test]
fn an_open_file_outlives_its_replacement() {
    let directory = directory();
    let (path, data) = one_tensor(&directory, &[5000]);
    let files = BACKENDS.map(|backend| TensorFile::open(&path, backend).expect("valid"));
    one_tensor(&directory, &[3]);
    for file in &files {
        assert_eq!(read(file, 0), data);
    }
    fs::remove_file(&path).expect("there");
    for file in &files {
        assert_eq!(read(file, 0), data);
    }
}

#[test]
fn reading_a_truncated_file_is_an_error() {
    let directory = directory();
    for shape in [vec![100], vec![300, 40_000]] {
        let (path, data) = one_tensor(&directory, &shape);
        let file = TensorFile::open(&path, Backend::Pread).expect("valid");
        let length = fs::metadata(&path).expect("there").len();
        OpenOptions::new().write(true).open(&path).expect("there").set_len(length - 1).expect("cut");
        let mut buffer = vec![0; data.len()];
        // SAFETY: the buffer is that long and nobody else's.
        let error =
            unsafe { file.read_tensors(&[(0, buffer.as_mut_ptr(), buffer.len())]) }.expect_err("short");
        assert_eq!(error.kind(), ErrorKind::FileChanged);
        assert_eq!(error.to_string().matches("one.safetensors").count(), 1, "{error}");

        let mut head: Vec<AxisRange> = shape.iter().map(|&dim| range(0, dim, 1)).collect();
        head[0] = range(0, 2, 1);
        assert!(read_slice(&file, 0, &head).is_ok(), "what is still there can be read");
        let tail: Vec<AxisRange> = shape.iter().map(|&dim| range(dim - 1, dim, 1)).collect();
        assert_eq!(read_slice(&file, 0, &tail).expect_err("gone").kind(), ErrorKind::FileChanged);
    }
}

/// Copying checks the file's size before each piece: touching a missing page would raise SIGBUS.
#[test]
fn copying_from_a_truncated_mapping_is_an_error() {
    let directory = directory();
    let (path, data) = one_tensor(&directory, &[300, 40_000]);
    let file = TensorFile::open(&path, Backend::Mmap).expect("valid");
    assert_eq!(read(&file, 0), data);
    OpenOptions::new().write(true).open(&path).expect("there").set_len(1 << 20).expect("cut");
    let mut buffer = vec![0; data.len()];
    // SAFETY: the buffer is that long and nobody else's.
    let error = unsafe { file.read_tensors(&[(0, buffer.as_mut_ptr(), buffer.len())]) }.expect_err("short");
    assert_eq!(error.kind(), ErrorKind::FileChanged);
    assert!(error.to_string().contains("one.safetensors"), "{error}");
}

#[test]
fn loaded_tensors_do_not_share_memory() {
    let directory = directory();
    let (path, data) = one_tensor(&directory, &[300, 40_000]);
    for backend in BACKENDS {
        let file = TensorFile::open(&path, backend).expect("valid");
        let memory = file.load_tensors(&[0, 0]).expect("loaded");
        drop(file);
        assert_ne!(memory.start(0), memory.start(1));
        for place in 0..2 {
            // SAFETY: the place has the tensor's bytes, and lives as long as `memory`.
            let loaded = unsafe { std::slice::from_raw_parts(memory.start(place), data.len()) };
            assert!(loaded == data);
        }
    }
    let file = TensorFile::open(&path, Backend::Pread).expect("valid");
    assert_eq!(file.load_tensors(&[1]).expect_err("there is one").kind(), ErrorKind::InvalidArgument);
}

#[test]
fn opening_reports_the_error_of_the_system() {
    let directory = directory();
    let fifo = directory.path().join("fifo");
    let name = std::ffi::CString::new(fifo.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: a string that ends in NUL.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let file = directory.path().join("file");
    fs::write(&file, "").expect("written");
    for (path, errno) in [
        (directory.path().join("absent"), libc::ENOENT),
        (directory.path().join("absent/file"), libc::ENOENT),
        (directory.path().to_path_buf(), libc::EISDIR),
        (file.join("below"), libc::ENOTDIR),
        (directory.path().join("n".repeat(300)), libc::ENAMETOOLONG),
        (fifo, libc::ENODEV),
        (PathBuf::from("/dev/null"), libc::ENODEV),
    ] {
        for backend in BACKENDS {
            let error = TensorFile::open(&path, backend).expect_err("refused");
            assert_eq!((error.kind(), error.os_error()), (ErrorKind::Io, Some(errno)), "{error}");
            assert_eq!(error.to_string().matches(&path.display().to_string()).count(), 1, "{error}");
        }
    }
    let error = TensorFile::open(Path::new("a\0b"), Backend::Mmap).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn errors_name_the_file() {
    let directory = directory();
    let path = directory.path().join("bad.safetensors");
    for (bytes, kind) in [
        (vec![], ErrorKind::FileTooSmall),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), ErrorKind::ForeignFormat),
        (common::file_bytes("{}", &[0]), ErrorKind::DataLength),
        (common::file_bytes("[]", &[]), ErrorKind::HeaderJson),
    ] {
        fs::write(&path, bytes).expect("written");
        for backend in BACKENDS {
            let error = TensorFile::open(&path, backend).expect_err("invalid");
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().starts_with(&format!("{}: ", path.display())), "{error}");
        }
    }
}

#[test]
fn misuse_is_refused() {
    let directory = directory();
    let (path, _) = one_tensor(&directory, &[4, 4]);
    for backend in BACKENDS {
        let file = TensorFile::open(&path, backend).expect("valid");
        assert_eq!(file.require("b").expect_err("absent").kind(), ErrorKind::TensorNotFound);
        assert_eq!(file.tensor(1).expect_err("one only").kind(), ErrorKind::InvalidArgument);
        let mut buffer = [0xAA; 17];
        for (index, length, kind) in [
            (0, 15, ErrorKind::BufferSize),
            (0, 17, ErrorKind::BufferSize),
            (1, 16, ErrorKind::InvalidArgument),
        ] {
            // SAFETY: the requested lengths do not exceed the buffer.
            let refused = unsafe { file.read_tensors(&[(index, buffer.as_mut_ptr(), length)]) };
            assert_eq!(refused.expect_err("refused").kind(), kind);
        }
        // Nothing is read if one size is wrong.
        let start = buffer.as_mut_ptr();
        // SAFETY: as above; the second request is refused for its size.
        let refused = unsafe { file.read_tensors(&[(0, start, 16), (0, start, 1)]) };
        assert_eq!(refused.expect_err("refused").kind(), ErrorKind::BufferSize);
        let slice = file.slice(0, &[range(0, 2, 1), range(0, 4, 1)]).expect("fits");
        // SAFETY: as above.
        let refused = unsafe { file.read_slice(0, &slice, buffer.as_mut_ptr(), 9) };
        assert_eq!(refused.expect_err("refused").kind(), ErrorKind::BufferSize);
        assert_eq!(buffer, [0xAA; 17]);
        for ranges in [
            vec![],
            vec![range(0, 4, 1)],
            vec![range(0, 5, 1), range(0, 4, 1)],
            vec![range(3, 2, 1), range(0, 4, 1)],
            vec![range(0, 4, 0), range(0, 4, 1)],
            vec![range(0, u64::MAX, 1), range(0, 4, 1)],
        ] {
            let error = file.slice(0, &ranges).expect_err("does not fit");
            assert_eq!(error.kind(), ErrorKind::Slice, "{ranges:?}");
            assert!(error.to_string().contains("\"a\""), "{error}");
        }
        // A step larger than the dimension selects one element.
        assert_eq!(read_slice(&file, 0, &[range(0, 4, u64::MAX), range(0, 4, 1)]).expect("fits").len(), 4);
    }
    assert_eq!("mmap".parse::<Backend>().ok(), Some(Backend::Mmap));
    assert_eq!("pread".parse::<Backend>().ok(), Some(Backend::Pread));
    let error = "io_uring".parse::<Backend>().expect_err("unknown");
    assert!(error.to_string().contains("mmap") && error.to_string().contains("pread"), "{error}");
}

#[test]
fn holes_of_sparse_files_are_read_as_zeros() {
    let directory = directory();
    let path = directory.path().join("sparse");
    let length: u64 = 40 << 20;
    let json = format!("{{\"a\":{{\"dtype\":\"U8\",\"shape\":[{length}],\"data_offsets\":[0,{length}]}}}}");
    let start = common::file_bytes(&json, &[]);
    let mut file = File::create(&path).expect("made");
    file.write_all(&start).expect("written");
    file.set_len(start.len() as u64 + length).expect("grown");
    file.write_all_at(&[9], start.len() as u64 + length - 1).expect("written");
    let file = TensorFile::open(&path, Backend::Pread).expect("valid");
    let bytes = read(&file, 0);
    assert_eq!((bytes.iter().filter(|&&b| b == 0).count() as u64, bytes.last()), (length - 1, Some(&9)));
}
