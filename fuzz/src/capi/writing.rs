//! The calls that write, and those that read a written checkpoint.

use std::fs;
use std::ptr::{null, null_mut};

use safetensors_torch::capi::*;
use safetensors_torch::{ErrorKind, Metadata};

use super::{INVALID, MANY, OK, Session, check, no_text, read};
use crate::directory::{replace, with_path};

impl Session<'_> {
    /// Adds tensor `a` to the writer, with bytes borrowed from the file, and under a name that may be a duplicate.
    pub(super) fn add_tensor(&self, a: usize, b: usize, c: usize) {
        let mut data = null();
        let Some(info) = self.info(a) else { return };
        // SAFETY: a handle and a place for a pointer.
        if !check(unsafe { sft_file_get_data(self.file, self.index(a), &mut data) }) {
            return;
        }
        let length = info.name.length - usize::from(b == 1).min(info.name.length);
        let dtype = if c < 200 { info.dtype } else { c as u32 - 200 };
        let nbytes = info.nbytes as usize / (1 + usize::from(b == 2));
        // SAFETY: name, shape and data are borrowed until the file is closed, and the writer is freed before.
        check(unsafe {
            sft_writer_add_tensor(
                self.writer,
                info.name.data,
                length,
                dtype,
                info.shape,
                info.rank,
                data,
                nbytes,
            )
        });
    }

    pub(super) fn add_metadata(&self, a: usize, b: usize) {
        let text = [&b""[..], b"key", b"\"\0\\", b"\xff", "\u{10ffff}\u{1}".as_bytes()];
        let (key, value) = (text[a % 5], text[b % 5]);
        // SAFETY: a handle and two texts.
        unsafe {
            if a == 200 {
                assert!(check(sft_writer_enable_metadata(self.writer)));
            }
            let status = sft_writer_add_metadata(
                self.writer,
                key.as_ptr().cast(),
                key.len(),
                value.as_ptr().cast(),
                value.len(),
            );
            let valid = a % 5 != 3 && b % 5 != 3;
            assert!(if valid {
                [OK, ErrorKind::Duplicate as sft_status].contains(&status)
            } else {
                status == INVALID
            });
            check(status);
        }
    }

    /// Writes the added tensors to a buffer, and opens it.
    pub(super) fn write_buffer(&self, a: usize, b: usize) {
        let options = sft_save_options {
            struct_size: size_of::<sft_save_options>(),
            alignment: [0, 8, 64, 4096, 24, u64::MAX][a % 6],
            durable: 0,
            reserved: u32::from(a == 250),
        };
        let mut nbytes = u64::MAX;
        // SAFETY: a handle, options, and a place for a number.
        if !check(unsafe { sft_writer_get_size(self.writer, &options, &mut nbytes) }) {
            return assert_eq!(nbytes, u64::MAX);
        }
        let length = nbytes as usize - usize::from(b == 1);
        let mut buffer = vec![0xAA; length];
        // SAFETY: a handle, options, and a buffer of that length; what it writes is in memory until then.
        let status =
            unsafe { sft_writer_write_buffer(self.writer, &options, buffer.as_mut_ptr().cast(), length) };
        assert_eq!(check(status), b != 1);
        if status == OK {
            let mut file = null_mut();
            // SAFETY: the buffer outlives the handle, which is freed here.
            unsafe {
                assert!(check(sft_file_open_buffer(buffer.as_ptr().cast(), length, &mut file)));
                sft_file_free(file);
            }
        }
    }

    /// Writes the added tensors to a file, and checks that it has the same bytes as a buffer.
    pub(super) fn write_file(&self, a: usize) {
        let mut nbytes = 0;
        // SAFETY: a handle, no options, a place for a number.
        if !check(unsafe { sft_writer_get_size(self.writer, null(), &mut nbytes) }) {
            return;
        }
        let mut buffer = vec![0xAA; nbytes as usize];
        // SAFETY: as above, and a buffer of that length.
        assert!(check(unsafe {
            sft_writer_write_buffer(self.writer, null(), buffer.as_mut_ptr().cast(), buffer.len())
        }));
        // Replaces the file that the data is mapped from, or writes another.
        with_path(["f.safetensors", "g.safetensors"][a % 2], |path, text| {
            // SAFETY: a handle and a path.
            assert!(check(unsafe { sft_writer_write_file(self.writer, text.as_ptr(), null()) }));
            assert!(fs::read(path).expect("written") == buffer);
        });
    }

    /// Opens the file as a shard, with an index that lists all or some of its tensors, or with the file itself as
    /// index.
    pub(super) fn checkpoint(&mut self, a: usize, b: usize) {
        self.checkpoint_done = true;
        let names: Vec<String> = (0..self.count.min(256))
            .filter(|&index| a < 128 || index != b)
            .map_while(|index| self.info(index))
            .map(|info| read(&info.name).to_string())
            .collect();
        let whole = names.len() == self.count;
        let files = ["s.safetensors", "./s.safetensors", "t.safetensors", "x//s.safetensors"];
        let file = files[if b < 200 { 0 } else { b % 4 }];
        let map: Metadata = names.into_iter().map(|name| (name, file.to_string())).collect();
        let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
        let index = if a == 255 { self.bytes } else { index.as_bytes() };
        with_path("s.safetensors", |path, _| replace(path, self.bytes));
        with_path("m.json", |path, text| {
            replace(path, index);
            let ignores = (b / 2) % 2 == 1;
            let options = sft_checkpoint_options {
                struct_size: size_of::<sft_checkpoint_options>(),
                backend: (b % 2) as u32,
                prefault: SFT_PREFAULT_NONE,
                variant: null(),
                extra: if ignores { SFT_EXTRA_IGNORE } else { SFT_EXTRA_ERROR },
                reserved: 0,
            };
            let mut checkpoint = null_mut();
            // SAFETY: a path, options, and a place for a handle.
            let status = unsafe { sft_checkpoint_open(text.as_ptr(), &options, &mut checkpoint) };
            // An index without tensors names no file.
            if a < 255 && (b < 200 || b.is_multiple_of(4)) && !map.is_empty() {
                assert_eq!(check(status), whole || ignores, "{map:?}");
            }
            if check(status) {
                self.look_through(checkpoint, &map);
            }
            // SAFETY: a handle that is not used again, or NULL.
            unsafe { sft_checkpoint_free(checkpoint) };
        });
    }

    /// Compares an open checkpoint with its index.
    pub(super) fn look_through(&self, checkpoint: *const sft_checkpoint, map: &Metadata) {
        let (mut shards, mut count, mut shard, mut index) = (0, 0, 0, 0);
        // SAFETY: an open handle, and places for results.
        unsafe {
            assert!(check(sft_checkpoint_get_shard_count(checkpoint, &mut shards)));
            assert!(check(sft_checkpoint_get_tensor_count(checkpoint, &mut count)));
            assert_eq!(count, map.len());
            assert!(!check(sft_checkpoint_get_sorted_tensor(checkpoint, count, &mut shard, &mut index)));
            let (mut name, mut file) = (no_text(), null());
            assert!(!check(sft_checkpoint_get_shard(checkpoint, shards, &mut name, &mut file)));
            for (position, tensor) in map.keys().enumerate().take(MANY) {
                assert!(check(sft_checkpoint_get_sorted_tensor(
                    checkpoint, position, &mut shard, &mut index
                )));
                let place = (shard, index);
                let text = tensor.as_bytes();
                assert!(check(sft_checkpoint_find_tensor(
                    checkpoint,
                    text.as_ptr().cast(),
                    text.len(),
                    &mut shard,
                    &mut index
                )));
                assert_eq!((shard, index), place);
                assert!(check(sft_checkpoint_get_shard(checkpoint, shard, &mut name, &mut file)));
                assert_eq!(read(&name), map[tensor]);
                assert!(check(sft_file_find_tensor(file, text.as_ptr().cast(), text.len(), &mut index)));
            }
        }
    }
}
