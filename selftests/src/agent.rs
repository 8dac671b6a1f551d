// SPDX-License-Identifier: GPL-2.0
//! The program that runs in a real guest as its process 1, and its protocol with the host.
//!
//! They exchange lines over a serial port. A request is `NUMBER VERB WORDS`. The answer is any
//! number of lines `NUMBER out WORD`, and then `NUMBER ok WORDS` or `NUMBER no WORD`. The guest
//! begins with `ready`, its kernel's release and its memory in KiB. A word contains no space: see
//! [`encode`].

mod area;
mod conversion;
mod init;
mod worker;

use std::fmt::Write as _;

use anyhow::{Context, Result};

pub use init::run;
pub use worker::work;

/// First word of the guest's first line.
pub const READY: &str = "ready";
/// An argument of the guest's kernel: the serial port of the protocol.
pub const PORT: &str = "memfile.port";
/// Folder of modules in the guest, and in it the file with their names in order.
pub const MODULES: &str = "/lib/modules/guest";
pub const ORDER: &str = "order";
/// The module that asks for conversions, where there is one.
pub const CONVERT: &str = "/lib/modules/memfile_guest.ko";

/// A line that answers a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// More lines follow.
    Out(String),
    Done(Vec<String>),
    Refused(String),
}

/// Text as one word: `%`, and each byte that is not a printable character of ASCII, become `%` and
/// two digits; empty text becomes `%`.
pub fn encode(text: &str) -> String {
    let mut word = String::new();
    for byte in text.bytes() {
        match byte {
            b'%' => word.push_str("%25"),
            0x21..=0x7e => word.push(byte.into()),
            _ => {
                let _ = write!(word, "%{byte:02x}");
            }
        }
    }
    if word.is_empty() { "%".into() } else { word }
}

/// The text of such a word; none if it is not one.
pub fn decode(word: &str) -> Option<String> {
    if word == "%" {
        return Some(String::new());
    }
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

/// A line of words, with its end.
pub fn line<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> String {
    let words: Vec<_> = words.into_iter().map(|word| encode(word.as_ref())).collect();
    words.join(" ") + "\n"
}

/// The words of a line.
pub fn words(line: &str) -> Result<Vec<String>> {
    let words = line.split_whitespace().map(decode);
    words.collect::<Option<_>>().with_context(|| format!("{line:?} is not in words"))
}

/// The number of the request that a line answers, and the answer; none if it is no answer.
pub fn answer(line: &str) -> Option<(u64, Answer)> {
    let mut words = words(line).ok()?.into_iter();
    let number = words.next()?.parse().ok()?;
    let kind = words.next()?;
    let answer = match kind.as_str() {
        "out" => Answer::Out(words.next()?),
        "ok" => Answer::Done(words.collect()),
        "no" => Answer::Refused(words.next()?),
        _ => return None,
    };
    Some((number, answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_as_they_were() {
        for text in ["", "a", "a b", "%", "100%25", "line\nfeed\r", "\u{fc}\0"] {
            let word = encode(text);
            assert!(!word.is_empty() && word.bytes().all(|b| b.is_ascii_graphic()), "{word:?}");
            assert_eq!(decode(&word).as_deref(), Some(text));
        }
        assert_eq!(words(&line(["a b", ""])).unwrap(), ["a b", ""]);
        for wrong in ["%2", "%zz", "%ff"] {
            assert_eq!(decode(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn answers_are_told_apart_from_noise() {
        assert_eq!(answer("7 ok 1 2\n"), Some((7, Answer::Done(vec!["1".into(), "2".into()]))));
        assert_eq!(answer("7 no a%20b"), Some((7, Answer::Refused("a b".into()))));
        assert_eq!(answer("7 out %"), Some((7, Answer::Out(String::new()))));
        for noise in ["", "ok 7", "7", "7 well", "\u{fffd}7 ok"] {
            assert_eq!(answer(noise), None, "{noise}");
        }
    }
}
