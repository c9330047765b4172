//! The calls that read the open file.

use std::ptr::null;

use safetensors_torch::capi::*;
use safetensors_torch::{AxisRange, Dtype, Slice};

use super::{MANY, OK, Session, check, no_text, read};

impl<'b> Session<'b> {
    /// Reads the info of tensor `a` into a struct of one of several versions.
    pub(super) fn tensor(&self, a: usize, b: usize) -> Option<sft_tensor_info> {
        // The current version, later ones, and sizes of no version.
        const SIZE: usize = size_of::<sft_tensor_info>();
        let size = [SIZE, SIZE + 8, SIZE + 16, 64, 0, usize::MAX][b % 6];
        let mut info = vec![u64::MAX; 16];
        info[0] = size as u64;
        // SAFETY: an open or closed handle, and room for 128 bytes, more than every size above.
        let status = unsafe { sft_file_get_tensor_info(self.file, self.index(a), info.as_mut_ptr().cast()) };
        if !self.check(status) {
            assert!(info[1..].iter().all(|&word| word == u64::MAX));
            return None;
        }
        assert!((SIZE..=SIZE + 16).contains(&size));
        assert!(self.index(a) < self.count);
        assert!(info[size.div_ceil(8)..].iter().all(|&word| word == u64::MAX));
        // SAFETY: the struct is `repr(C)`, holds integers and pointers, and its first version is what was filled.
        let info = unsafe { info.as_ptr().cast::<sft_tensor_info>().read() };
        assert!(info.begin <= info.end && info.end <= self.bytes.len() as u64);
        assert_eq!(info.nbytes, info.end - info.begin);
        // Compares every byte.
        read(&info.name);
        let mut nbytes = 0;
        // SAFETY: the pointer borrows `rank` dimensions of the open file (header).
        assert!(check(unsafe { sft_dtype_compute_nbytes(info.dtype, info.shape, info.rank, &mut nbytes) }));
        assert_eq!(nbytes, info.nbytes);
        Some(info)
    }

    /// Returns the info of tensor `a`, with the current version of the struct.
    pub(super) fn info(&self, a: usize) -> Option<sft_tensor_info> {
        self.tensor(a, 0)
    }

    /// The bytes of a tensor.
    pub(super) fn expected(&self, info: &sft_tensor_info) -> &'b [u8] {
        &self.bytes[info.begin as usize..info.end as usize]
    }

    pub(super) fn sorted(&self, a: usize) {
        let mut index = usize::MAX;
        // SAFETY: a handle and a place for a number.
        if self.check(unsafe { sft_file_get_sorted_index(self.file, self.index(a), &mut index) }) {
            assert!(index < self.count);
        }
    }

    pub(super) fn find(&self, a: usize, b: usize) {
        let Some(info) = self.info(a) else { return };
        let name = read(&info.name);
        let mut index = usize::MAX;
        // A part of the name, perhaps cut within a character.
        let length = name.len() - (b % 4).min(name.len());
        // SAFETY: a handle, `length` borrowed bytes, and a place for a number.
        let found = check(unsafe { sft_file_find_tensor(self.file, info.name.data, length, &mut index) });
        assert!(found || length < name.len());
        if length == name.len() {
            assert_eq!(index, self.index(a));
        }
    }

    pub(super) fn metadata(&self, a: usize, b: usize) {
        let (mut present, mut count) = (-1, usize::MAX);
        let (mut key, mut value, mut again) = (no_text(), no_text(), no_text());
        // SAFETY: a handle, places for results, and a borrowed key.
        unsafe {
            if !self.check(sft_file_has_metadata(self.file, &mut present)) {
                return;
            }
            assert!(check(sft_file_get_metadata_count(self.file, &mut count)));
            assert!(present == 1 || (present == 0 && count == 0));
            if check(sft_file_get_metadata_entry(self.file, a % (count + 1), &mut key, &mut value)) {
                let length = key.length - (b % 3).min(key.length);
                let status = sft_file_find_metadata(self.file, key.data, length, &mut again);
                if check(status) && length == key.length {
                    assert_eq!(read(&again), read(&value));
                }
            } else {
                assert_eq!(a % (count + 1), count);
            }
        }
    }

    pub(super) fn data(&self, a: usize) {
        let mut data = null();
        // SAFETY: a handle and a place for a pointer.
        let ok = self.check(unsafe { sft_file_get_data(self.file, self.index(a), &mut data) });
        assert_eq!(ok, !data.is_null());
        if ok {
            assert!(self.in_memory);
            let info = self.info(a).expect("it has data");
            // SAFETY: the pointer borrows that many bytes of the open file (header).
            let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), info.nbytes as usize) };
            assert!(bytes == self.expected(&info));
        } else {
            assert!(self.closed || !self.in_memory || self.index(a) >= self.count);
        }
    }

    pub(super) fn read(&self, a: usize, b: usize) {
        let nbytes = self.info(a).map_or(b, |info| info.nbytes as usize);
        let length = [nbytes, nbytes, nbytes + 1, nbytes.saturating_sub(1)][b % 4];
        let mut buffer = vec![0; length];
        // SAFETY: a handle, and a buffer of that length.
        if self.check(unsafe {
            sft_file_read_tensor(self.file, self.index(a), buffer.as_mut_ptr().cast(), length)
        }) {
            assert!(buffer == self.expected(&self.info(a).expect("it was read")));
        }
    }

    pub(super) fn read_many(&self, a: usize, b: usize, c: usize) {
        let indices: Vec<usize> = (0..b % MANY).map(|i| self.index(a + i * (c % 5))).collect();
        let mut buffers: Vec<Vec<u8>> = indices
            .iter()
            .map(|&index| vec![0; self.info(index).map_or(c, |info| info.nbytes as usize)])
            .collect();
        let mut reads: Vec<sft_read_request> = indices
            .iter()
            .zip(&mut buffers)
            .map(|(&index, buffer)| sft_read_request {
                index,
                buffer: buffer.as_mut_ptr().cast(),
                nbytes: buffer.len(),
            })
            .collect();
        if c == 77
            && let Some(last) = reads.last_mut()
        {
            last.nbytes /= 2;
        }
        // SAFETY: a handle, and `reads` of buffers that are apart and at least as long as they say.
        if self.check(unsafe { sft_file_read_tensors(self.file, reads.as_ptr(), reads.len()) }) {
            for (index, buffer) in indices.iter().zip(&buffers) {
                assert!(buffer == self.expected(&self.info(*index).expect("it was read")));
            }
        }
    }

    pub(super) fn slice(&self, a: usize, b: usize, c: usize) {
        let info = self.info(a);
        let dims: Vec<u64> = info.map_or(Vec::new(), |info| {
            // SAFETY: the pointer borrows `rank` dimensions of the open file (header); it is not NULL, even for rank 0.
            unsafe { std::slice::from_raw_parts(info.shape, info.rank) }.to_vec()
        });
        let mut ranges: Vec<sft_range> = dims
            .iter()
            .enumerate()
            .map(|(axis, &dim)| {
                let bits = ((b << 8 | c) >> (axis % 12)) as u64;
                let start = if bits & 1 == 0 { 0 } else { (bits >> 2 & 7).min(dim) };
                let stop = if bits & 2 == 0 { dim } else { (start + (bits >> 4 & 7)).min(dim) };
                sft_range { start, stop, step: 1 + (bits >> 3 & 3) }
            })
            .collect();
        if b == 250 {
            ranges.push(sft_range { start: 0, stop: 1, step: 1 });
        }
        if b == 251
            && let Some(range) = ranges.last_mut()
        {
            *range = sft_range { start: u64::MAX - c as u64, stop: u64::MAX, step: 0 };
        }
        let mut shape = vec![u64::MAX; ranges.len()];
        let mut nbytes = u64::MAX;
        let rank = ranges.len();
        // SAFETY: a handle, `rank` ranges, room for `rank` dimensions and a number.
        let status = unsafe {
            sft_file_get_slice_size(
                self.file,
                self.index(a),
                ranges.as_ptr(),
                rank,
                shape.as_mut_ptr(),
                &mut nbytes,
            )
        };
        if !self.check(status) {
            assert!(nbytes == u64::MAX && shape.iter().all(|&dim| dim == u64::MAX));
            return;
        }
        let info = info.expect("it was sliced");
        assert!(nbytes <= info.nbytes);
        let length = nbytes as usize + usize::from(c == 99);
        let mut buffer = vec![0; length];
        // SAFETY: a handle, `rank` ranges, and a buffer of that length.
        let status = unsafe {
            sft_file_read_slice(
                self.file,
                self.index(a),
                ranges.as_ptr(),
                rank,
                buffer.as_mut_ptr().cast(),
                length,
            )
        };
        assert_eq!(check(status), c != 99);
        if status == OK {
            let axes: Vec<AxisRange> =
                ranges.iter().map(|r| AxisRange { start: r.start, stop: r.stop, step: r.step }).collect();
            let dtype = Dtype::from_number(info.dtype).expect("a dtype");
            // The target `slice` checks the contents of slices.
            let plan = Slice::plan("t", dtype, &dims, &axes).expect("planned before");
            let data = self.expected(&info);
            let runs = plan.byte_ranges().map(|run| &data[run.start as usize..run.end as usize]);
            assert!(buffer == runs.collect::<Vec<_>>().concat());
        }
    }
}
