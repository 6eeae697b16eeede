//! File names of Curve's interface, and the volumes they stand for.
//!
//! ```text
//!  cbd:POOL//cinder/volume-1_USER_:/etc/curve/client.conf ──► core:cinder.volume-1
//!      └──┬┘ └──────┬──────┘└─┬──┘ └────────┬───────────┘
//!    ignored      path      owner        ignored
//!  file:disk1, mem:x, null:x, core:x ───────────────────────► themselves
//! ```
//!
//! A volume's name has no slashes: `/` becomes `.`, and `.` becomes `..`. So that no two paths have one
//! name, a directory or file that begins or ends with a dot, or is empty, is refused.

use std::borrow::Cow;

use nebd_client::Errno;

/// `NEBD_MAX_FILE_PATH_LEN`.
const PATH_BYTES_MAX: usize = 1024;
/// What Curve's names begin with.
const CURVE: &str = "cbd:";

/// The volume that a file name stands for.
pub fn volume_of(file_name: &str) -> Result<Cow<'_, str>, Errno> {
    if file_name.len() > PATH_BYTES_MAX {
        return Err(Errno::INVAL);
    }
    match file_name.strip_prefix(CURVE) {
        None => Ok(Cow::Borrowed(file_name)),
        Some(rest) => core_volume(rest).map(Cow::Owned).ok_or(Errno::INVAL),
    }
}

/// `rest` is what follows `cbd:`.
fn core_volume(rest: &str) -> Option<String> {
    let (_pool, rest) = rest.split_once('/')?;
    // The client's configuration, which has no colon, comes last; it may be missing.
    let path = rest.rsplit_once(':').map_or(rest, |(path, _)| path);
    let (path, _owner) = path.strip_suffix('_')?.rsplit_once('_')?;
    let mut name = String::from("core:");
    for (index, part) in path.strip_prefix('/').unwrap_or(path).split('/').enumerate() {
        if part.is_empty() || part.starts_with('.') || part.ends_with('.') {
            return None;
        }
        if index > 0 {
            name.push('.');
        }
        name.push_str(&part.replace('.', ".."));
    }
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_backends_stand_for_themselves() {
        for name in ["file:disk1", "mem:x", "null:x", "core:x", "nonsense"] {
            assert_eq!(volume_of(name).unwrap(), name);
        }
    }

    #[test]
    fn curves_names_stand_for_core_volumes() {
        for (name, volume) in [
            ("cbd:pool//path_user_:/etc/curve/client.conf", "core:path"),
            ("cbd:pool//path_user_", "core:path"),
            ("cbd:pool/path_user_:/x", "core:path"),
            (
                "cbd:pool1//cinder/volume-6f30_cinder_:/etc/curve/client.conf",
                "core:cinder.volume-6f30",
            ),
            ("cbd:p//a_b_c_:/x", "core:a_b"),
            ("cbd:p//a/b.raw_u_:/x", "core:a.b..raw"),
        ] {
            assert_eq!(volume_of(name).unwrap(), volume, "{name}");
        }
    }

    #[test]
    fn what_is_no_curve_name_is_refused() {
        for name in [
            "cbd:",
            "cbd:pool",
            "cbd:pool/",
            "cbd:pool//:/etc/x",
            "cbd:pool//path:/x",
            "cbd:p//path_",
            "cbd:p//_u_",
            "cbd:p//a//b_u_",
            "cbd:p//../a_u_",
            "cbd:p//a./b_u_",
            "cbd:p//a/_u_",
        ] {
            assert_eq!(volume_of(name), Err(Errno::INVAL), "{name}");
        }
        assert_eq!(volume_of(&"x".repeat(1025)), Err(Errno::INVAL));
    }
}
