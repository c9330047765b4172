//! The memory that this process can still use, given the machine and the control group.

use std::fs::read_to_string;
use std::path::Path;

/// Where a version of control groups keeps the memory of a group.
struct Version {
    mount: &'static str,
    limit: &'static str,
    used: &'static str,
    /// The names in `memory.stat` of the page cache, and of the part that cannot be freed (tmpfs).
    page_cache: &'static str,
    shared_memory: &'static str,
}

const V1: Version = Version {
    mount: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    page_cache: "total_cache",
    shared_memory: "total_shmem",
};

const V2: Version = Version {
    mount: "/sys/fs/cgroup",
    limit: "memory.max",
    used: "memory.current",
    page_cache: "file",
    shared_memory: "shmem",
};

/// Returns how many bytes this process can still use; the page cache counts as free. `None` if that is unknown.
pub fn available_memory() -> Option<u64> {
    let machine = machine_available(&read_to_string("/proc/meminfo").ok()?)?;
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups
        .lines()
        .filter_map(group_of)
        .filter_map(|(version, group)| group_available(Path::new(version.mount), Path::new(group), &version));
    Some(limits.fold(machine, u64::min))
}

/// Returns the group in a line of `/proc/self/cgroup`, relative to the mount point, if it may limit the memory.
fn group_of(line: &str) -> Option<(Version, &str)> {
    let (_, rest) = line.split_once(':')?;
    let (controllers, group) = rest.split_once(":/")?;
    match controllers {
        "" => Some((V2, group)),
        _ => controllers.split(',').any(|controller| controller == "memory").then_some((V1, group)),
    }
}

/// Returns the available memory in the text of `/proc/meminfo`.
fn machine_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Returns the least memory that a limit of `group` or of a group above it leaves; `None` without a limit. A container may see
/// its own group as the root, and not the names above it.
fn group_available(root: &Path, group: &Path, version: &Version) -> Option<u64> {
    group.ancestors().filter_map(|group| remaining_in(&root.join(group), version)).min()
}

/// Returns the memory that the limit of the group at `directory` leaves; `None` without a limit.
fn remaining_in(directory: &Path, version: &Version) -> Option<u64> {
    let number = |name: &str| read_to_string(directory.join(name)).ok()?.trim().parse::<u64>().ok();
    // Without a limit, the file contains "max" (version 2) or more than any machine has. The root of version 2 has no file.
    let (limit, used) = (number(version.limit)?, number(version.used)?);
    let stat = read_to_string(directory.join("memory.stat")).unwrap_or_default();
    let bytes_of = |name: &str| {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok())
    };
    let page_cache = bytes_of(version.page_cache).unwrap_or(0);
    let freeable = page_cache.saturating_sub(bytes_of(version.shared_memory).unwrap_or(0));
    Some(limit.saturating_sub(used.saturating_sub(freeable)))
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
    fn groups_of_both_versions_are_found() {
        let found = |line| group_of(line).map(|(version, group)| (version.limit, group));
        assert_eq!(found("0::/user.slice/a b"), Some(("memory.max", "user.slice/a b")));
        assert_eq!(found("7:memory:/docker/12:3"), Some(("memory.limit_in_bytes", "docker/12:3")));
        assert_eq!(found("4:cpu,memory:/"), Some(("memory.limit_in_bytes", "")));
        for line in ["3:cpu,cpuacct:/x", "1:name=systemd:/memory", "", "0::"] {
            assert_eq!(found(line), None, "{line}");
        }
    }

    #[test]
    fn the_lowest_limit_applies_and_the_page_cache_is_free() {
        for (version, no_limit) in [(V2, "max"), (V1, "9223372036854771712")] {
            let root = tempfile::tempdir().expect("a directory");
            let inner = root.path().join("outer/inner");
            std::fs::create_dir_all(&inner).expect("directories");
            let write = |directory: &str, name: &str, text: &str| {
                std::fs::write(root.path().join(directory).join(name), text).expect("written");
            };
            let available = |group: &str| group_available(root.path(), Path::new(group), &version);
            assert_eq!(available("outer/inner"), None);
            write("outer", version.limit, "1000\n");
            write("outer", version.used, "700\n");
            assert_eq!(available("outer/inner"), Some(300));
            let (cache, shared) = (version.page_cache, version.shared_memory);
            write("outer", "memory.stat", &format!("anon 100\n{cache} 520\n{cache}_mapped 7\n{shared} 20\n"));
            assert_eq!(available("outer/inner"), Some(800));
            write("outer/inner", version.limit, &format!("{no_limit}\n"));
            write("outer/inner", version.used, "600\n");
            assert_eq!(available("outer/inner"), Some(800));
            write("outer/inner", version.limit, "900\n");
            assert_eq!(available("outer/inner"), Some(300));
            assert_eq!(available("elsewhere"), None);
        }
    }
}
