// SPDX-License-Identifier: GPL-2.0
//! The table of who pays for which memory, and when.
