//! The handshake of Firecracker's UFFD protocol, as rules over bytes; no I/O.
//!
//! The VMM sends one JSON array of regions and one userfaultfd, and expects no answer. The JSON
//! may come in pieces, and the descriptor with any of them.

use serde::Deserialize;

use crate::layout::Layout;

/// Longest message: 64 regions need some 12 KiB.
const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Most regions of a VM.
const MAX_REGIONS: usize = 64;
/// What a guest page is when the message does not say (Firecracker before 1.7).
const DEFAULT_PAGE_BYTES: u64 = 4096;

/// A rule that a handshake broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Not what the protocol says.
    #[error("handshake refused: {0}")]
    Rule(String),
    /// Nothing complete arrived in time.
    #[error("handshake refused: no complete message with a userfaultfd within {0} s")]
    Late(u64),
    /// The socket failed.
    #[error("handshake failed: {0}")]
    Socket(String),
}

/// A region as the VMM describes it. Unknown fields are ignored.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Description {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// Bytes too, whatever its name says.
    page_size_kib: Option<u64>,
}

/// A message as it arrives. Every byte is looked at once, and the JSON is parsed once, when its
/// first bracket is closed: a VMM that sends single bytes costs no more than one that does not.
#[derive(Debug)]
pub(crate) struct Message {
    /// The length of the memory file.
    memory_bytes: u64,
    bytes: Vec<u8>,
    /// Brackets and braces that are open.
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// All regions, checked, once the JSON was complete.
    layout: Option<Layout>,
}

impl Message {
    pub(crate) fn new(memory_bytes: u64) -> Self {
        let (bytes, layout) = (Vec::new(), None);
        Self { memory_bytes, bytes, depth: 0, in_string: false, escaped: false, layout }
    }

    /// Takes what has arrived.
    pub(crate) fn push(&mut self, chunk: &[u8]) -> Result<(), HandshakeError> {
        if self.bytes.len() + chunk.len() > MAX_MESSAGE_BYTES {
            return Err(rule(format!("the message is longer than {MAX_MESSAGE_BYTES} bytes")));
        }
        for byte in chunk {
            self.bytes.push(*byte);
            let blank = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
            if self.layout.is_some() {
                // Firecracker sends the array and nothing else.
                require(blank, "there are bytes after the array of regions")?;
            } else if self.closes(*byte) || (self.depth == 0 && !blank) {
                self.layout = Some(self.parse()?);
            }
        }
        Ok(())
    }

    /// The layout, if the message is complete.
    pub(crate) fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    /// Follows the nesting by one byte; whether it closes what was opened first.
    fn closes(&mut self, byte: u8) -> bool {
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = byte == b'\\' && !self.escaped;
            return false;
        }
        match byte {
            b'"' => self.in_string = self.depth > 0,
            b'[' | b'{' => self.depth += 1,
            b']' | b'}' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }

    fn parse(&self) -> Result<Layout, HandshakeError> {
        let regions: Vec<Description> = serde_json::from_slice(&self.bytes)
            .map_err(|error| rule(format!("the message is not an array of regions ({error})")))?;
        check(&regions, self.memory_bytes)
    }
}

fn rule(text: impl Into<String>) -> HandshakeError {
    HandshakeError::Rule(text.into())
}

fn require(condition: bool, text: &str) -> Result<(), HandshakeError> {
    if condition { Ok(()) } else { Err(rule(text)) }
}

fn check(regions: &[Description], memory_bytes: u64) -> Result<Layout, HandshakeError> {
    require(!regions.is_empty(), "there is no region")?;
    require(regions.len() <= MAX_REGIONS, "there are more than 64 regions")?;
    let page_bytes = page_bytes(&regions[0])?;
    for region in regions {
        let same = self::page_bytes(region)? == page_bytes;
        require(same, "the regions have different page sizes")?;
        require(region.size > 0, "a region is empty")?;
        let aligned = [region.base_host_virt_addr, region.size, region.offset]
            .iter()
            .all(|value| value.is_multiple_of(page_bytes));
        require(aligned, "a region is not aligned to its page size")?;
        let end = region.base_host_virt_addr.checked_add(region.size);
        require(end.is_some(), "a region goes beyond the address space")?;
        // The last page of a file may be partly outside it.
        let file_end = region.offset.checked_add(region.size);
        let inside = file_end.is_some_and(|end| end <= memory_bytes.next_multiple_of(page_bytes));
        require(inside, "a region goes beyond the memory file")?;
    }
    disjoint(regions, |region| region.base_host_virt_addr, "two regions overlap in addresses")?;
    disjoint(regions, |region| region.offset, "two regions overlap in the memory file")?;
    let spans =
        regions.iter().map(|region| (region.base_host_virt_addr, region.size, region.offset));
    Ok(Layout::new(spans, page_bytes, memory_bytes))
}

fn page_bytes(region: &Description) -> Result<u64, HandshakeError> {
    let page_bytes = region.page_size.or(region.page_size_kib).unwrap_or(DEFAULT_PAGE_BYTES);
    let known = matches!(page_bytes, 4096 | 0x20_0000);
    if known {
        Ok(page_bytes)
    } else {
        Err(rule(format!("the page size is {page_bytes} bytes, not 4096 or 2097152")))
    }
}

fn disjoint(
    regions: &[Description],
    start: impl Fn(&Description) -> u64,
    text: &str,
) -> Result<(), HandshakeError> {
    let mut spans: Vec<_> = regions.iter().map(|region| (start(region), region.size)).collect();
    spans.sort_unstable();
    let apart = spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0);
    require(apart, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(start: u64, size: u64, offset: u64, rest: &str) -> String {
        format!(r#"{{"base_host_virt_addr":{start},"size":{size},"offset":{offset}{rest}}}"#)
    }

    fn parse(bytes: &[u8], memory_bytes: u64) -> Result<Option<Layout>, HandshakeError> {
        let mut message = Message::new(memory_bytes);
        message.push(bytes)?;
        Ok(message.layout)
    }

    fn outcome(regions: &[String]) -> Result<Option<Layout>, HandshakeError> {
        parse(format!("[{}]", regions.join(",")).as_bytes(), 256 * MIB)
    }

    fn refused(regions: &[String], why: &str) {
        let error = outcome(regions).expect_err(why);
        assert!(error.to_string().contains(why), "{error} should say {why}");
    }

    #[test]
    fn page_size_is_bytes_under_both_names_and_4096_without() {
        for (rest, expected) in [
            ("", 4096),
            (r#","page_size":4096"#, 4096),
            (r#","page_size_kib":4096"#, 4096),
            (r#","page_size":2097152,"page_size_kib":2097152"#, 2 * MIB),
            (r#","page_size_kib":2097152,"new_field":{"a":[1]}"#, 2 * MIB),
        ] {
            match outcome(&[region(2 * MIB, 4 * MIB, 0, rest)]) {
                Ok(Some(layout)) => assert_eq!(layout.page_bytes(), expected, "{rest}"),
                other => panic!("{rest}: {other:?}"),
            }
        }
    }

    #[test]
    fn every_broken_rule_is_named() {
        refused(&[], "there is no region");
        let many: Vec<_> = (0..65).map(|n| region(n * MIB, 4096, n * 4096, "")).collect();
        refused(&many, "more than 64 regions");
        refused(&[region(MIB, MIB, 0, r#","page_size":8192"#)], "page size is 8192");
        refused(&[region(MIB, MIB, 0, r#","page_size":4"#)], "page size is 4 bytes");
        refused(&[region(MIB + 1, MIB, 0, "")], "not aligned");
        refused(&[region(MIB, MIB + 5, 0, "")], "not aligned");
        refused(&[region(MIB, MIB, 7, "")], "not aligned");
        refused(&[region(MIB, MIB, 0, r#","page_size":2097152"#)], "not aligned");
        refused(&[region(MIB, 0, 0, "")], "a region is empty");
        refused(&[region(u64::MAX - 4095, 8192, 0, "")], "beyond the address space");
        refused(&[region(MIB, 2 * MIB, 255 * MIB, "")], "beyond the memory file");
        refused(&[region(MIB, MIB, u64::MAX - 4095, "")], "beyond the memory file");
        let overlap = [region(MIB, 2 * MIB, 0, ""), region(2 * MIB, MIB, 8 * MIB, "")];
        refused(&overlap, "overlap in addresses");
        let overlap = [region(MIB, 2 * MIB, 0, ""), region(8 * MIB, MIB, MIB, "")];
        refused(&overlap, "overlap in the memory file");
        let mixed =
            [region(0, MIB, 0, ""), region(8 * MIB, 2 * MIB, 2 * MIB, r#","page_size":2097152"#)];
        refused(&mixed, "different page sizes");
        for text in [
            "{}",
            "[1]",
            "x",
            r#"[{"size":1}]"#,
            r#"[{"base_host_virt_addr":-1,"size":1,"offset":0}]"#,
        ] {
            let error = parse(text.as_bytes(), MIB).expect_err(text);
            assert!(error.to_string().contains("not an array of regions"), "{error}");
        }
    }

    #[test]
    fn a_message_in_pieces_is_waited_for_and_a_long_one_is_whole() {
        let regions: Vec<_> =
            (0..64).map(|n| region(n * 4 * MIB, MIB, n * MIB, r#","page_size":4096"#)).collect();
        let text = format!("[{}]", regions.join(","));
        assert!(text.len() > 1024);
        let mut message = Message::new(256 * MIB);
        for byte in text.as_bytes() {
            assert!(message.layout().is_none());
            message.push(&[*byte]).expect("a good message");
        }
        assert!(message.layout().is_some());
        assert!(message.push(b" \n").is_ok() && message.layout().is_some());
        assert!(message.push(b"[").is_err(), "bytes after the array");
        assert!(parse(format!("{text}x").as_bytes(), 256 * MIB).is_err());
        let strange = region(0, MIB, 0, r#","a":"]}\\\"]""#);
        assert!(outcome(&[strange]).expect("brackets in a string are text").is_some());
        let endless =
            vec![b'['; 1].into_iter().chain(vec![b' '; MAX_MESSAGE_BYTES]).collect::<Vec<_>>();
        assert!(parse(&endless, MIB).is_err());
    }
}
