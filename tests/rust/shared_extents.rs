//! A rewrite of a file shares the data's blocks with the old file, on filesystems that can. Needs root, loop devices and
//! the programs that make the filesystems; skipped without them.

mod common;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use safetensors_torch::{
    Backend, Dtype, EditOptions, MetadataChanges, SaveOptions, TensorFile, TensorSpec, edit_metadata,
    save_file,
};

const DISK_BYTES: u64 = 400 << 20;
const DATA_BYTES: usize = 64 << 20;

/// A filesystem in a file, mounted until this is dropped.
struct Disk {
    mount: PathBuf,
    _directory: tempfile::TempDir,
}

impl Disk {
    fn mount(make: &[&str]) -> Result<Disk, String> {
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let (image, mount) = (directory.path().join("image"), directory.path().join("mount"));
        File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).expect("a sparse file");
        fs::create_dir(&mount).expect("a directory");
        run(Command::new(make[0]).args(&make[1..]).arg(&image))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount))?;
        Ok(Disk { mount, _directory: directory })
    }

    /// The bytes that are allocated, once everything is written back.
    fn used(&self) -> u64 {
        run(Command::new("sync").arg("-f").arg(&self.mount)).expect("synchronized");
        let format = ["-f", "-c", "%S %b %f"];
        let output = Command::new("stat").args(format).arg(&self.mount).output().expect("told");
        let text = String::from_utf8(output.stdout).expect("numbers");
        let numbers: Vec<u64> = text.split_whitespace().map(|word| word.parse().expect("a number")).collect();
        (numbers[1] - numbers[2]) * numbers[0]
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.mount)).expect("unmounted");
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = || format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    if output.status.success() { Ok(()) } else { Err(text()) }
}

fn check(make: &[&str]) {
    let disk = match Disk::mount(make) {
        Ok(disk) => disk,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let path = disk.mount.join("model.safetensors");
    // The last block is a part of one.
    let data: Vec<u8> = (0..DATA_BYTES + 1).map(|index| (index * 7 % 251) as u8).collect();
    let spec = TensorSpec { name: "a", dtype: Dtype::U8, shape: &[data.len() as u64] };
    save_file(&[spec], &[&data], None, &path, SaveOptions::default()).expect("saved");
    let before = disk.used();
    for (round, length) in [10, 100, 5000, 20].into_iter().enumerate() {
        // The other name keeps the blocks of the old file.
        fs::hard_link(&path, disk.mount.join(round.to_string())).expect("linked");
        let value = "v".repeat(length);
        let changes = MetadataChanges::from([("key".to_string(), Some(value.clone()))]);
        edit_metadata(&path, &changes, EditOptions::default()).expect("edited");
        let file = TensorFile::open(&path, Backend::Pread).expect("valid");
        assert!(common::read(&file, 0) == data);
        assert_eq!(file.header().metadata().expect("some")["key"], value);
        let added = disk.used().saturating_sub(before);
        assert!(
            added < (DATA_BYTES / 16) as u64,
            "{make:?}: {added} bytes were written in {} edits",
            round + 1
        );
    }
}

#[test]
fn xfs_copies_no_data() {
    check(&["mkfs.xfs", "-q", "-m", "reflink=1"]);
}

#[test]
fn btrfs_copies_no_data() {
    check(&["mkfs.btrfs", "-q"]);
}
