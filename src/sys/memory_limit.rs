//! The memory that this process can still use, given the machine and the control group.

use std::fs::read_to_string;
use std::path::Path;

/// The mount point of control groups, version 2.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Returns how many bytes this process can still use; the page cache counts as free. `None` if that is unknown.
pub fn available_memory() -> Option<u64> {
    let machine = machine_available(&read_to_string("/proc/meminfo").ok()?)?;
    let own = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Some(group_available(Path::new(CGROUPS), Path::new(group)).map_or(machine, |bytes| bytes.min(machine)))
}

/// Returns the available memory in the text of `/proc/meminfo`.
fn machine_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Returns the least memory that a limit of `group` or of a group above it leaves; `None` without a limit.
fn group_available(root: &Path, group: &Path) -> Option<u64> {
    group.ancestors().filter_map(|group| remaining_in(&root.join(group))).min()
}

/// Returns the memory that the limit of the group at `directory` leaves; `None` without a limit.
fn remaining_in(directory: &Path) -> Option<u64> {
    let number = |name: &str| read_to_string(directory.join(name)).ok()?.trim().parse::<u64>().ok();
    // The file contains "max" without a limit, and is missing in the root.
    let (limit, used) = (number("memory.max")?, number("memory.current")?);
    let stat = read_to_string(directory.join("memory.stat")).unwrap_or_default();
    let page_cache =
        stat.lines().find_map(|line| line.strip_prefix("file ")?.parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(page_cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_memory() {
        assert!(available_memory().is_none_or(|bytes| bytes > 1 << 20));
        assert_eq!(machine_available("MemTotal: 9 kB\nMemAvailable:      123 kB\n"), Some(123 * 1024));
        assert_eq!(machine_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn the_lowest_limit_applies_and_the_page_cache_is_free() {
        let root = tempfile::tempdir().expect("a directory");
        let inner = root.path().join("outer/inner");
        std::fs::create_dir_all(&inner).expect("directories");
        let write = |directory: &str, name: &str, text: &str| {
            std::fs::write(root.path().join(directory).join(name), text).expect("written");
        };
        assert_eq!(group_available(root.path(), Path::new("outer/inner")), None);
        write("outer", "memory.max", "1000\n");
        write("outer", "memory.current", "700\n");
        assert_eq!(group_available(root.path(), Path::new("outer/inner")), Some(300));
        write("outer", "memory.stat", "anon 100\nfile 500\nfile_mapped 7\n");
        assert_eq!(group_available(root.path(), Path::new("outer/inner")), Some(800));
        write("outer/inner", "memory.max", "max\n");
        write("outer/inner", "memory.current", "600\n");
        assert_eq!(group_available(root.path(), Path::new("outer/inner")), Some(800));
        write("outer/inner", "memory.max", "900\n");
        assert_eq!(group_available(root.path(), Path::new("outer/inner")), Some(300));
        assert_eq!(group_available(root.path(), Path::new("elsewhere")), None);
    }
}
