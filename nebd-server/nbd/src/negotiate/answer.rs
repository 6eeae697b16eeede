//! Answers to options.

use super::option::{self, Infos};
use super::{CloseReason, ExportQuestion, ListQuestion, Negotiation, Phase, Purpose};
use super::{Refusal, Step, TlsPolicy};
use crate::export::{Export, ExportFlags, Negotiated, Sizes, Terms};
use crate::wire::{self, info, option as number, reply};

impl Negotiation {
    /// Options that can be answered by closing alone.
    pub(super) fn unanswerable(&self, option: u32, bytes: u32) -> Option<CloseReason> {
        if option != number::EXPORT_NAME {
            return (!self.fixed).then_some(CloseReason::NotFixed(option));
        }
        if self.lacks_tls() {
            Some(CloseReason::TlsRequired)
        } else if self.shutting_down {
            Some(CloseReason::Refused(Refusal::Shutdown))
        } else if bytes as usize > wire::STRING_BYTES_MAX {
            Some(CloseReason::Name)
        } else {
            None
        }
    }

    /// Options whose answer does not depend on their data, and what it is.
    pub(super) fn refused_unread(&self, option: u32, bytes: u32) -> Option<u32> {
        let has_no_data =
            matches!(option, number::LIST | number::STARTTLS | number::STRUCTURED_REPLY);
        let has_data = matches!(
            option,
            number::EXPORT_NAME
                | number::INFO
                | number::GO
                | number::LIST_META_CONTEXT
                | number::SET_META_CONTEXT
        );
        if option == number::ABORT {
            // Whatever comes with it is ignored.
            Some(reply::ACK)
        } else if self.shutting_down {
            Some(reply::ERR_SHUTDOWN)
        } else if self.lacks_tls() && option != number::STARTTLS {
            Some(reply::ERR_TLS_REQD)
        } else if !has_data && !has_no_data {
            Some(reply::ERR_UNSUP)
        } else if has_no_data && bytes > 0 {
            Some(reply::ERR_INVALID)
        } else if bytes > self.policy.limits.option_bytes_max {
            Some(reply::ERR_TOO_BIG)
        } else {
            match option {
                number::LIST if !self.policy.list => Some(reply::ERR_POLICY),
                number::STARTTLS if self.tls => Some(reply::ERR_INVALID),
                number::STARTTLS if self.policy.tls == TlsPolicy::Off => Some(reply::ERR_POLICY),
                number::LIST_META_CONTEXT | number::SET_META_CONTEXT if !self.structured => {
                    Some(reply::ERR_INVALID)
                }
                _ => None,
            }
        }
    }

    fn lacks_tls(&self) -> bool {
        self.policy.tls == TlsPolicy::Required && !self.tls
    }

    /// The final reply to an option.
    pub(super) fn finish(&mut self, option: u32, answer: u32, out: &mut Vec<u8>) -> Step {
        self.phase = Phase::Header;
        push(out, option, answer, &[text(answer).as_bytes()]);
        match option {
            number::ABORT => self.close(CloseReason::Aborted),
            _ => Step::Sent,
        }
    }

    /// An option with its data.
    pub(super) fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Step {
        let asked = match option {
            number::EXPORT_NAME => match wire::Cursor(data).string(data.len()) {
                Some(name) => Some((name, Purpose::ExportName)),
                None => return self.close(CloseReason::Name),
            },
            number::INFO | number::GO => option::info(data)
                .map(|(name, infos)| (name, Purpose::Info { go: option == number::GO, infos })),
            number::LIST_META_CONTEXT | number::SET_META_CONTEXT => {
                option::meta(option, data).map(|(name, meta)| (name, Purpose::Meta(meta)))
            }
            number::LIST => {
                self.phase = Phase::Asked;
                return Step::List(ListQuestion(()));
            }
            number::STARTTLS => {
                push(out, option, reply::ACK, &[]);
                self.phase = Phase::Tls;
                return Step::StartTls;
            }
            number::STRUCTURED_REPLY => {
                self.structured = true;
                return self.finish(option, reply::ACK, out);
            }
            _ => return self.finish(option, reply::ERR_UNSUP, out),
        };
        match asked {
            Some((name, purpose)) => {
                self.phase = Phase::Asked;
                Step::Export(ExportQuestion { name: name.to_owned(), purpose })
            }
            None => self.finish(option, reply::ERR_INVALID, out),
        }
    }

    /// From now on, what comes in and goes out does so under TLS. What was agreed on before may
    /// have been said by anybody, and is forgotten.
    pub fn tls_started(&mut self) {
        if self.phase == Phase::Tls {
            self.tls = true;
            self.structured = false;
            self.allocation_of = None;
            self.phase = Phase::Header;
        }
    }

    /// Answers with the names and descriptions of the exports; what cannot be a name is left out.
    pub fn answer_list<N: AsRef<str>, D: AsRef<str>>(
        &mut self,
        ListQuestion(()): ListQuestion,
        exports: impl IntoIterator<Item = (N, D)>,
        out: &mut Vec<u8>,
    ) -> Step {
        if self.phase != Phase::Asked {
            return self.out_of_turn();
        }
        for (name, description) in exports {
            let (name, description) = (name.as_ref(), description.as_ref());
            if wire::is_string(name) {
                let length = (name.len() as u32).to_be_bytes();
                let description = if wire::is_string(description) { description } else { "" };
                let parts = [&length, name.as_bytes(), description.as_bytes()];
                push(out, number::LIST, reply::SERVER, &parts);
            }
        }
        self.finish(number::LIST, reply::ACK, out)
    }

    /// Answers with an export, or why there is none for this client.
    pub fn answer_export(
        &mut self,
        question: ExportQuestion,
        answer: Result<Export, Refusal>,
        out: &mut Vec<u8>,
    ) -> Step {
        if self.phase != Phase::Asked {
            return self.out_of_turn();
        }
        let ExportQuestion { name, purpose } = question;
        let answer = match answer {
            Err(Refusal::TlsRequired) if self.tls => Err(Refusal::Unknown),
            answer => answer,
        };
        match (purpose, answer) {
            (Purpose::ExportName, Ok(export)) => self.export_name(&name, export, out),
            (Purpose::ExportName, Err(refusal)) => self.close(CloseReason::Refused(refusal)),
            (Purpose::Info { go, infos }, answer) => {
                let option = if go { number::GO } else { number::INFO };
                match answer {
                    Ok(export) => self.info(&name, option, infos, export, out),
                    Err(refusal) => self.finish(option, error_of(refusal), out),
                }
            }
            (Purpose::Meta(meta), Err(refusal)) => self.finish(meta.option, error_of(refusal), out),
            (Purpose::Meta(meta), Ok(_)) => {
                let is_set = meta.option == number::SET_META_CONTEXT;
                if meta.allocation {
                    let id = if is_set { wire::ALLOCATION_CONTEXT_ID } else { 0 }.to_be_bytes();
                    let parts = [&id, wire::ALLOCATION_CONTEXT.as_bytes()];
                    push(out, meta.option, reply::META_CONTEXT, &parts);
                }
                if is_set && meta.allocation {
                    self.allocation_of = Some(name);
                }
                self.finish(meta.option, reply::ACK, out)
            }
        }
    }

    fn out_of_turn(&self) -> Step {
        match self.phase {
            Phase::Over(Some(reason)) => Step::Close(reason),
            _ => Step::Waiting,
        }
    }

    fn export_name(&mut self, asked: &str, export: Export, out: &mut Vec<u8>) -> Step {
        if export.sizes.minimum() > self.policy.unasked_minimum_max {
            return self.close(CloseReason::SizesRequired);
        }
        out.extend(export.size.to_be_bytes());
        out.extend(self.flags_of(&export).bits().to_be_bytes());
        if self.zeroes {
            out.extend([0; wire::EXPORT_NAME_ZEROES]);
        }
        self.enter(asked, export)
    }

    fn info(
        &mut self,
        asked: &str,
        option: u32,
        infos: Infos,
        export: Export,
        out: &mut Vec<u8>,
    ) -> Step {
        let mut item = |kind: u16, parts: [&[u8]; 3]| {
            push(out, option, reply::INFO, &[&kind.to_be_bytes(), parts[0], parts[1], parts[2]]);
        };
        let (minimum, payload_max) = (export.sizes.minimum(), export.sizes.payload_max());
        // The constraints are told unasked too: who reads them knows what will be refused.
        if infos.sizes || export.sizes != Sizes::DEFAULT {
            let words = [minimum, export.sizes.preferred(), payload_max].map(u32::to_be_bytes);
            item(info::BLOCK_SIZE, [&words[0], &words[1], &words[2]]);
        }
        if !infos.sizes && minimum > self.policy.unasked_minimum_max {
            return self.finish(option, reply::ERR_BLOCK_SIZE_REQD, out);
        }
        let flags = self.flags_of(&export).bits().to_be_bytes();
        item(info::EXPORT, [&export.size.to_be_bytes(), &flags, &[]]);
        if infos.name && wire::is_string(&export.name) {
            item(info::NAME, [export.name.as_bytes(), &[], &[]]);
        }
        if infos.description && wire::is_string(&export.description) {
            item(info::DESCRIPTION, [export.description.as_bytes(), &[], &[]]);
        }
        let step = self.finish(option, reply::ACK, out);
        if option == number::GO { self.enter(asked, export) } else { step }
    }

    fn flags_of(&self, export: &Export) -> ExportFlags {
        export.flags.offered(self.structured)
    }

    fn enter(&mut self, asked: &str, export: Export) -> Step {
        self.phase = Phase::Over(None);
        let terms = Terms {
            size: export.size,
            sizes: export.sizes,
            flags: self.flags_of(&export),
            structured: self.structured,
            // Selected for this very name, or not at all.
            allocation: self.allocation_of.as_deref() == Some(asked),
        };
        Step::Transmission(Negotiated { export: export.name, terms, tls: self.tls })
    }
}

fn error_of(refusal: Refusal) -> u32 {
    match refusal {
        Refusal::Unknown => reply::ERR_UNKNOWN,
        Refusal::TlsRequired => reply::ERR_TLS_REQD,
        Refusal::Policy => reply::ERR_POLICY,
        Refusal::Shutdown => reply::ERR_SHUTDOWN,
    }
}

/// What a person at the client may get to see.
fn text(answer: u32) -> &'static str {
    match answer {
        reply::ERR_UNSUP => "this server does not know the option",
        reply::ERR_POLICY => "not allowed by this server",
        reply::ERR_INVALID => "the option is malformed, or comes too early or too late",
        reply::ERR_TLS_REQD => "TLS is required",
        reply::ERR_UNKNOWN => "there is no such export",
        reply::ERR_SHUTDOWN => "the server is shutting down",
        reply::ERR_BLOCK_SIZE_REQD => "the client must ask for the block size of this export",
        reply::ERR_TOO_BIG => "the option is too long",
        _ => "",
    }
}

fn push(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.extend(wire::OPTION_REPLY_MAGIC.to_be_bytes());
    // Names and texts are a few KiB at most.
    for word in [option, kind, length as u32] {
        out.extend(word.to_be_bytes());
    }
    for part in parts {
        out.extend_from_slice(part);
    }
}
