//! What to tell a hypervisor, so that it finds its disk and waits for the server's successor.

use nebd_rpc::admin::{Attachment, AttachmentKind};

/// The socket, and lines to copy.
pub fn text(attachment: &Attachment) -> String {
    let lines = match attachment.kind() {
        AttachmentKind::Nbd => nbd(attachment),
        _ => vhost_user(attachment),
    };
    let Attachment { volume, socket, .. } = attachment;
    let access = if attachment.read_only { ", read-only" } else { "" };
    let kind = super::Kind::name_of(attachment.kind());
    format!("{volume} is attached as {kind}{access}, at {socket}\n\n{lines}")
}

fn vhost_user(attachment: &Attachment) -> String {
    let queues = attachment.queues;
    let (option, value) = (comma_doubled(&attachment.socket), xml(&attachment.socket));
    let readonly = if attachment.read_only { "\n    <readonly/>" } else { "" };
    format!(
        "\
QEMU (the memory must be shared, of the guest's size):
  -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem -m 1G \\
  -chardev socket,id=nebd0,path={option},reconnect-ms=100 \\
  -device vhost-user-blk-pci,chardev=nebd0,num-queues={queues}

libvirt:
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
  <disk type='vhostuser' device='disk'>
    <driver name='qemu' type='raw' queues='{queues}'/>
    <source type='unix' path='{value}'>
      <reconnect enabled='yes' timeout='1'/>
    </source>
    <target dev='vda' bus='virtio'/>{readonly}
  </disk>

cloud-hypervisor:
  --memory size=1G,shared=on --disk vhost_user=on,socket={socket},num_queues={queues},queue_size=128
",
        socket = attachment.socket
    )
}

fn nbd(attachment: &Attachment) -> String {
    let (volume, option) = (&attachment.volume, comma_doubled(&attachment.socket));
    let (value, query) = (xml(&attachment.socket), percent_encoded(&attachment.socket));
    let (option_read_only, readonly) = match attachment.read_only {
        true => (",read-only=on", "\n    <readonly/>"),
        false => ("", ""),
    };
    format!(
        "\
QEMU:
  -blockdev driver=nbd,node-name=nebd0,server.type=unix,server.path={option},export={volume},\
reconnect-delay=60,open-timeout=10,cache.direct=on,discard=unmap{option_read_only} \\
  -device virtio-blk-pci,drive=nebd0

libvirt:
  <disk type='network' device='disk'>
    <driver name='qemu' type='raw' cache='none' discard='unmap'/>
    <source protocol='nbd' name='{volume}'>
      <host transport='unix' socket='{value}'/>
      <reconnect delay='60'/>
    </source>
    <target dev='vda' bus='virtio'/>{readonly}
  </disk>

URI:
  nbd+unix:///{volume}?socket={query}
"
    )
}

/// In an option of QEMU a comma ends the value.
fn comma_doubled(text: &str) -> String {
    text.replace(',', ",,")
}

fn xml(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('\'', "&apos;")
}

/// In the query of a URI.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(byte.into());
            }
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(kind: AttachmentKind) -> Attachment {
        Attachment {
            volume: "file:disk1".into(),
            kind: kind.into(),
            socket: "/run/a,b&'c d".into(),
            queues: 4,
            ..Attachment::default()
        }
    }

    #[test]
    fn a_socket_is_quoted_as_each_reader_needs_it() {
        let vhost = text(&attachment(AttachmentKind::VhostUser));
        assert!(vhost.contains("path=/run/a,,b&'c d,reconnect-ms=100 "), "{vhost}");
        assert!(vhost.contains("path='/run/a,b&amp;&apos;c d'>"), "{vhost}");
        assert!(vhost.contains("num-queues=4\n") && vhost.contains("num_queues=4,"), "{vhost}");
        let nbd = text(&attachment(AttachmentKind::Nbd));
        assert!(nbd.contains("server.path=/run/a,,b&'c d,export=file:disk1,"), "{nbd}");
        assert!(nbd.contains("\n  nbd+unix:///file:disk1?socket=/run/a%2Cb%26%27c%20d\n"), "{nbd}");
    }

    #[test]
    fn a_disk_that_is_only_read_says_so() {
        for kind in [AttachmentKind::VhostUser, AttachmentKind::Nbd] {
            let writable = attachment(kind);
            assert!(!text(&writable).contains("readonly"));
            let text = text(&Attachment { read_only: true, ..writable });
            assert!(text.contains("<readonly/>") && text.contains(", read-only, at"), "{text}");
        }
    }
}
