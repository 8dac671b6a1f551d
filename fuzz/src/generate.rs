// SPDX-License-Identifier: GPL-2.0
//! Random operations.

use std::num::NonZeroUsize;

use libafl_bolts::rands::Rand;
use memfile_selftests::script::Step;
use memfile_selftests::script::op::*;

/// Flags of memfd_create: mostly an inaccessible file, now and then any bits.
const FLAGS: [u32; 8] = [0x20, 0x20, 0x20, 0x60, 0x22, 0x02, 0x28, 0];

/// Random numbers as operations want them.
pub struct Dice<'a, R>(pub &'a mut R);

impl<R: Rand> Dice<'_, R> {
    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        NonZeroUsize::new(bound).map_or(0, |bound| self.0.below(bound))
    }

    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    pub fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn byte(&mut self, bound: usize) -> u8 {
        self.below(bound) as u8
    }

    /// Few files and few VMs: operations are to meet.
    fn number(&mut self, bound: usize) -> u8 {
        if self.coin() { 0 } else { self.byte(bound) }
    }

    /// Pages: few, or a huge page, or many.
    fn pages(&mut self) -> u16 {
        match self.below(6) {
            0 => 1,
            1 => 512,
            2 => self.pick(&[511, 513, 1024, 2048]),
            3 => self.below(2048) as u16 + 1,
            _ => self.below(64) as u16 + 1,
        }
    }

    fn at(&mut self) -> u16 {
        match self.below(6) {
            0 | 1 => 0,
            2 => self.pick(&[511, 512, 1024]),
            3 => self.below(2048) as u16,
            4 => self.pick(&[0xffff, 0x8000, 0x7fff]),
            _ => self.below(64) as u16,
        }
    }

    pub fn range(&mut self) -> Range {
        Range { at: self.at(), pages: self.pages() }
    }

    fn machine(&mut self) -> Machine {
        match self.below(18) {
            0 => Machine::Compact,
            1 => Machine::DropCaches,
            2..=5 => Machine::Reclaim { pages: self.pages() },
            6 => Machine::Limit { units: self.byte(8) },
            7 => Machine::Swap { on: self.coin() },
            8 | 9 => Machine::ShmemHuge { policy: self.byte(4) },
            10 => Machine::AnonymousHuge { policy: self.byte(3) },
            11 => Machine::Khugepaged { eager: self.coin() },
            12 => Machine::Ksm { on: self.coin() },
            13 => Machine::NxHugePages { on: self.coin() },
            14 => Machine::Generations { on: self.coin() },
            15 => Machine::Pool { pages: self.byte(24) },
            16 => Machine::Fail { on: self.coin() },
            _ => Machine::ReadCounters,
        }
    }

    /// Any operation.
    pub fn op(&mut self) -> Op {
        let (file, vm) = (self.number(FILES), self.number(VMS));
        let (vcpu, slot) = (self.number(VCPUS), self.number(SLOTS));
        let consumer = self.number(CONSUMERS);
        match self.below(56) {
            0..=2 => {
                let flags = if self.one_in(16) { self.0.next() as u32 } else { self.pick(&FLAGS) };
                Op::File { file, flags, pages: self.pages() }
            }
            3 | 4 => Op::HugeFile { file, flags: self.pick(&FLAGS), pages: self.byte(5).into() },
            5 => Op::StoreFile { file, pages: self.pages() },
            6 => Op::GuestMemfd { file, vm, pages: self.pages(), flags: self.byte(8) },
            7 => Op::Close { file },
            8 => {
                let bytes = if self.coin() { 0 } else { self.below(4096) as u16 };
                Op::Truncate { file, pages: self.pages(), bytes }
            }
            9..=13 => {
                let mode = self.pick(&[3, 3, 3, 1, 1, 0, 2, 16]);
                let bytes = if self.one_in(8) { self.below(4096) as u16 } else { 0 };
                Op::Fallocate { file, mode, range: self.range(), bytes }
            }
            14 => Op::Seal { file, seals: self.pick(&[64, 64, 1, 2, 4, 8, 16, 32, 0x7f]) },
            15 | 16 => {
                let ways = [
                    Way::Read,
                    Way::Write,
                    Way::Map,
                    Way::Send,
                    Way::Copy,
                    Way::Seek,
                    Way::Reopen,
                    Way::Forget,
                    Way::CacheStat,
                    Way::FdInfo,
                ];
                Op::Reach { file, way: self.pick(&ways), range: self.range() }
            }
            17 | 18 => Op::Vm { vm, protected: !self.one_in(8) },
            19 => Op::CloseVm { vm },
            20 | 21 => Op::Cap { vm, cap: self.number(3), argument: self.byte(17) },
            22..=25 => {
                let shift = if self.one_in(3) { self.below(64) as i16 - 32 } else { 0 };
                let flags = if self.one_in(3) { self.byte(128) } else { 0 };
                Op::Slot { vm, slot, file, range: self.range(), shift, flags }
            }
            26 => Op::Delete { vm, slot },
            27..=31 => Op::Convert {
                vm,
                file,
                range: self.range(),
                private: !self.one_in(3),
                region: self.coin(),
            },
            32 => Op::Populate { vm, file, range: self.range() },
            33 | 34 => Op::PreFault { vm, vcpu, file, range: self.range() },
            35..=41 => {
                let acts = [
                    Act::Fill,
                    Act::Fill,
                    Act::Fill,
                    Act::Check,
                    Act::Check,
                    Act::Execute,
                    Act::Privatise,
                    Act::Share,
                ];
                let (act, range) = (self.pick(&acts), self.range());
                Op::Guest { vm, vcpu, file, act, range, answer: !self.one_in(4) }
            }
            42 => {
                let advice = [
                    Advice::Discard,
                    Advice::Huge,
                    Advice::Small,
                    Advice::Mergeable,
                    Advice::PageOut,
                    Advice::Collapse,
                ];
                Op::Advise { vm, slot, range: self.range(), advice: self.pick(&advice) }
            }
            43 | 44 => Op::Bind {
                consumer,
                file,
                range: self.range(),
                mode: self.byte(3),
                flags: self.byte(17),
            },
            45 => Op::Unbind { consumer },
            46 | 47 => Op::Get {
                consumer,
                at: self.at(),
                how: self.pick(&[How::Get, How::Hold, How::Fault]),
            },
            48 => {
                let what = match self.below(5) {
                    0 => StoreWhat::Migrate,
                    1 => StoreWhat::Referenced,
                    2 => StoreWhat::WriteOut { refused: self.coin() },
                    3 => StoreWhat::Break,
                    _ => StoreWhat::Fail { errno: self.pick(&[0, 12, 133, 4]) },
                };
                Op::Store { file, at: self.at(), what }
            }
            49..=53 => Op::Machine(self.machine()),
            54 => Op::Lose { consumer, at: self.at(), soft: !self.one_in(3) },
            _ => Op::Meet,
        }
    }

    /// An operation and a thread.
    pub fn step(&mut self) -> Step {
        Step { thread: self.number(THREADS), op: self.op() }
    }
}
